"""The eager modules and ``mosaic.attention`` on real ranks, in float64, against one process:
outputs, and gradients of inputs and parameters."""

from __future__ import annotations

import module_jobs as jobs
import pytest
import torch
import whole_jobs
from sampling import FULL

import mosaic


def check(answers: list[dict[str, float]], tol: float = 1e-10) -> None:
    wrong = {
        f"rank {rank}: {case}": error
        for rank, errors in enumerate(answers)
        for case, error in errors.items()
        if not error < tol
    }
    assert answers[0] and not wrong, dict(list(wrong.items())[:8])


@pytest.mark.parametrize("p", [1, FULL(2), 4])
@pytest.mark.parametrize(
    "job", ["functional", "multi_axis", "cross", "two_axes", "plain_modules", "masked"]
)
def test_equals_one_process(ranks, job: str, p: int) -> None:
    check(ranks(p).run(getattr(jobs, job), p))


@pytest.mark.parametrize("p", [2, FULL(3), FULL(4)])
@pytest.mark.parametrize(
    "job, compiler",
    [
        ("functional", None), ("modules", "mosaic"),
        FULL("functional", "mosaic"), FULL("modules", None),
    ],
)  # fmt: skip
def test_on_sharded_tensors(ranks, job: str, p: int, compiler: str | None) -> None:
    check(ranks(p).run(getattr(whole_jobs, job), p, compiler))


def test_a_sharded_tensor_is_no_shard(ranks) -> None:
    for texts in ranks(2).run(whole_jobs.refused, 2):
        layout, mesh, grid, gathered, cut = texts
        assert "a ShardedTensor has its own" in layout
        assert "is cut over mesh axis 'sp', and 'rows' is asked for" in mesh
        assert "Mesh2D(3, 5) does not fit 2 ranks" in grid
        assert "take x.full_tensor()" in gathered
        assert "mosaic.distribute" in cut


def test_two_mesh_axes_as_one(ranks) -> None:
    check(ranks(4).run(jobs.joint))


def test_dropout_is_the_same_for_every_backend_and_p(ranks) -> None:
    (want,) = ranks(1).run(jobs.dropout, 1)
    for p in (2, 4):
        for got in ranks(p).run(jobs.dropout, p):
            torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(got[:-1], got[:1].expand_as(got[:-1]), rtol=0, atol=1e-12)
            torch.testing.assert_close(got[-1], want[-1], rtol=0, atol=1e-12)
    assert (want[0] - want[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("compiler", [None, FULL("aot_eager"), "mosaic"])
def test_a_model_with_other_layers(ranks, compiler: str | None) -> None:
    check(ranks(2).run(jobs.block, 2, compiler))


FEW = ["rows", "two axes", "composed", "dropout"]
KINDS = [*FEW, "heads", "cross", "nodes"]


@pytest.mark.parametrize(
    "compiler, kinds", [FULL("aot_eager", KINDS), FULL("mosaic", KINDS), FULL("mosaic", FEW)]
)
def test_each_module_is_one_graph(ranks, compiler: str, kinds: list[str]) -> None:
    options = {"options": {"inner": "eager"}} if compiler == "mosaic" else {}
    check(ranks(2).run(jobs.compiled, 2, compiler, kinds, **options))


@pytest.mark.parametrize("compiler", [FULL("inductor"), "mosaic"])
def test_by_inductor(ranks, compiler: str) -> None:
    check(ranks(2).run(jobs.compiled, 2, compiler, KINDS[:1]))


def test_one_process_needs_no_init() -> None:
    x = torch.randn(2, 6, 8)
    local = mosaic.MultiAxisAttention(8, 2, 1, causal=True)
    for backend, shape in (("ring", None), ("mesh2d", (2, 2)), ("ulysses", None)):
        module = mosaic.MultiAxisAttention(8, 2, 1, backend, shape, causal=True)
        module.load_state_dict(local.state_dict())
        torch.testing.assert_close(module(x), local(x))
    q = torch.randn(1, 2, 5, 4)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    for plain in (mosaic.ComposedAttention((2, 2)), mosaic.HierarchicalAttention(2)):
        torch.testing.assert_close(plain(q, q, q), want)
