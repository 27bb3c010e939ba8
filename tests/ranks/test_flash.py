"""Calls of the package flash_attn, of versions 2 to 4: what they give is what they give in one
process, with the log-sum-exp where it is read."""

from __future__ import annotations

from functools import partial

import pytest
from compare import assert_close, compare_gradients
from flash_jobs import CALLS, OF_TEXTS, calling, numbers_of_texts, run_llama
from sampling import FULL, sampled
from test_inputs import check


def few(*names: str) -> list[object]:
    """These, and all others behind the marker."""
    return sampled(CALLS, set(CALLS) - set(names))


@pytest.mark.parametrize("name", few("varlen_qkvpacked", "third_plain"))
def test_calls(ranks, name: str) -> None:
    check(ranks, partial(calling, name), words_of(name), 2)


@pytest.mark.parametrize("name", few("fourth_varlen"))
def test_log_sum_exps(ranks, name: str) -> None:
    """In float32, as the package gives it; only version 4 has a gradient of it."""
    check(ranks, partial(calling, name, reads=True), words_of(name), 2, tol=1e-6)


@pytest.mark.parametrize("name", ["torch_varlen", FULL("fourth_varlen"), FULL("varlen_kvpacked")])
def test_numbers_of_texts(ranks, name: str) -> None:
    """A second number of texts compiles again, the others do not."""
    want = numbers_of_texts(name, 1)
    for rank, got in enumerate(ranks(2).run(numbers_of_texts, name, 2, timeout=600)):
        assert got["programs"] == 2, rank
        for key, x in want["found"].items():
            assert_close(f"{key} on rank {rank}", got["found"][key], x, 1e-11)


#: What a call has, and how the plan calls its mask; None where it breaks the graph.
LLAMAS = {"texts": "causal, documents", "batches": "causal", "padding": None, "positions": None}


@pytest.mark.full
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("kind", LLAMAS)
def test_llama_by_flash_attention_2(ranks, kind: str, p: int) -> None:
    """transformers finds out by data where padding and texts are, if it is not told: these layers'
    graphs are broken, and what is between attends whole. (Its norms and its loss are float32.)"""
    want = run_llama(kind, 1)
    for rank, got in enumerate(ranks(p).run(run_llama, kind, p, timeout=900)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        if LLAMAS[kind]:
            assert got["masks"] == [(LLAMAS[kind], "all_gather")] * 2
            assert got["programs"] == 1


def words_of(name: str) -> str:
    if name == "plain":
        return "causal, window 10"
    return "causal, documents" if CALLS[name] in OF_TEXTS else "causal"
