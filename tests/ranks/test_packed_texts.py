"""Packed texts through layers without attention on real ranks: each is what it is by itself,
whoever holds its rows."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, compare_gradients
from text_jobs import Case, Mixer, in_float64, run_many, run_packed, run_texts
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import mosaic
from mosaic.frontend.recurrences import recurrence

FULL = pytest.mark.full
RULE = "torch_chunk_gated_delta_rule"
ONE = ((9, 1, 13, 6),)
TWO = ((9, 1, 13, 6), (4, 18, 7))
MANY = [(2, "mamba2")]
MANY += [pytest.param(p, call, marks=FULL) for p in (1, 3) for call in ("delta", "kimi")]
CASES = [
    (2, Case("delta", ONE)),
    (3, Case("mamba2", TWO)),
    (2, Case("delta", ONE, packaged=True)),
    (2, Case("mamba2", TWO, packaged=True)),
    *(
        pytest.param(p, Case(call, lengths, packaged), marks=FULL)
        for call, lengths in (("delta", ONE), ("kimi", ONE), ("mamba2", TWO), ("mamba2", ONE))
        for packaged in (False, True)
        for p in (1, 2, 3, 4)
    ),
]


@pytest.mark.parametrize(("p", "case"), CASES, ids=str)
def test_layers(ranks, p: int, case: Case) -> None:
    want = run_texts(case, 0)
    for rank, got in enumerate(ranks(p).run(run_texts, case, p)):
        assert_close(f"result of rank {rank}", got["result"], want["result"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert not got["gathered"]
        assert got["graphs"] == 1


@pytest.mark.parametrize(("p", "call"), MANY)
def test_one_program_for_many_lengths(ranks, p: int, call: str) -> None:
    """Padding to a bucket changes no row, and no gradient."""
    compare_many(ranks(p), call, [(9, 1, 13, 6), (2, 5, 4, 8), (4, 3, 19, 5)], (32,), 1)


def test_one_program_for_many_texts(ranks) -> None:
    """The second number of texts compiles a program for any."""
    compare_many(ranks(2), "delta", [(9, 1, 13, 6), (10, 19), (4, 9, 9, 2, 5), (29,)], None, 2)


def compare_many(pool, call: str, texts: list, buckets: tuple[int, ...] | None, count: int) -> None:
    cases = [Case(call, (lengths,)) for lengths in texts]
    want = [run_texts(case, 0) for case in cases]
    for got in pool.run(run_many, cases, buckets, pool.p):
        assert got["graphs"] == count
        assert not got["gathered"]
        for step, expected in zip(got["steps"], want, strict=True):
            assert_close("result", step["result"], expected["result"], 1e-10)
            compare_gradients(expected["gradients"], step["gradients"], 1e-10)


@pytest.mark.parametrize(
    ("p", "name", "packaged"),
    [
        (2, "qwen3_next", False),
        pytest.param(2, "bamba", False, marks=FULL),
        pytest.param(3, "qwen3_next", True, marks=FULL),
        pytest.param(3, "bamba", True, marks=FULL),
    ],
)
def test_models(ranks, p: int, name: str, packaged: bool) -> None:
    """transformers' own (their norms and their loss are float32)."""
    want = run_packed(0, name)
    for rank, got in enumerate(ranks(p).run(run_packed, p, name, packaged, timeout=900)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert not got["gathered"]


def test_what_it_cannot_be_told_is_refused() -> None:
    """While it is compiled, with what is wrong."""
    layer, x = Mixer("delta"), torch.randn(2, 9, 8)
    with in_float64(packaged=False), pytest.raises(Exception, match="several rows of texts"):
        mosaic.explain(layer, x, None, torch.tensor([0, 4, 9]), sp_size=2)


Q, V, G = torch.randn(1, 9, 2, 3), torch.randn(1, 9, 2, 3), torch.rand(1, 9, 2)
SCAN = (torch.randn(1, 6, 9), torch.rand(1, 6, 9), -torch.rand(6, 2), *torch.randn(2, 1, 2, 9))


@pytest.mark.parametrize(
    ("module", "name", "given", "options", "said"),
    [
        (qwen, RULE, (Q, Q, V, G, G), {"seq_idx": Q}, "it reads them from cu_seqlens"),
        (mamba, "mamba_selective_scan", SCAN, {"seq_idx": Q}, "it has no form for them"),
        (qwen, RULE, (Q, Q, V, G, G), {"cu_seqlens": Q, "output_final_state": True}, "use_cache"),
    ],
)
def test_forms_that_are_refused(module, name, given, options, said) -> None:
    with pytest.raises(mosaic.UnsupportedError, match=said):
        recurrence(getattr(module, name), *given, **options)
