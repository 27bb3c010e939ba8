"""Layers without attention on real ranks: what they give is what they give in one process, and what
is sent are states, however long the axis is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from compare import assert_close, compare_gradients
from recurrence_jobs import BATCH, CALLS, HEADS, K_DIM, V_DIM, Case, run_layer, run_library

FULL = pytest.mark.full
LAYERS = [
    (2, Case("chunk", first=True, last=True)),
    (3, Case("mamba2", first=True, last=True, n=29)),
    (2, Case("mamba", last=True, n=11)),
    (3, Case("chunk", n=2)),  # a rank has no row
    (2, Case("package", last=True, n=19)),
    *(
        pytest.param(p, Case(call, first=call != "mamba", last=True, n=n), marks=FULL)
        for call in CALLS
        for p in (1, 2, 3, 4)
        for n in (2, 5, 37)
    ),
    *(pytest.param(2, Case(call), marks=FULL) for call in CALLS),
]


@pytest.fixture(scope="module")
def layer_on(ranks) -> Callable[[Case, int], list[dict[str, Any]]]:
    """What each of p ranks does."""
    return cache(lambda case, p: ranks(p).run(run_layer, case, p))


@pytest.mark.parametrize(("p", "case"), LAYERS, ids=str)
def test_layers(layer_on, p: int, case: Case) -> None:
    want = run_layer(case, 0)
    for rank, got in enumerate(layer_on(case, p)):
        for i, (one, other) in enumerate(zip(got["results"], want["results"], strict=True)):
            assert_close(f"result {i} of rank {rank}", one, other, 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert not got["gathered"]
        assert got["graphs"] == 1


@pytest.mark.parametrize("n", [37, pytest.param(9, marks=FULL)])
def test_states_are_all_that_is_sent(layer_on, n: int) -> None:
    """Of a gated delta rule (k_dim, v_dim + k_dim) for each head and stretch, at any length."""
    (got, *_) = layer_on(Case("chunk", first=True, last=True, n=n), 2)
    one = BATCH * HEADS * K_DIM * (V_DIM + K_DIM) * 8
    assert got["states"] == [one]  # the other rank's is as large


def test_halves_are_as_close_as_in_one_process(ranks) -> None:
    case = Case("chunk", n=19, dtype=torch.bfloat16)
    exact, plain = run_layer(Case("chunk", n=19), 0), run_layer(case, 0)
    (got, *_) = ranks(2).run(run_layer, case, 2)
    learned = {name: x for name, x in exact["gradients"].items() if x is not None}
    for name, want in learned.items():
        error, allowed = ((x["gradients"][name].double() - want).norm() for x in (got, plain))
        assert error <= 1.5 * allowed + 1e-3 * want.norm(), name


@pytest.mark.parametrize(
    ("p", "name", "how"),
    [
        (2, "qwen3_next", "found"),
        pytest.param(2, "mamba2", "found", marks=FULL),
        pytest.param(3, "qwen3_next, padding", "whole", marks=FULL),
        pytest.param(2, "qwen3_next", "parallelize", marks=FULL),
        pytest.param(4, "qwen3_next, padding", "parallelize", marks=FULL),
        pytest.param(2, "mamba2", "parallelize", marks=FULL),
    ],
)
def test_models(ranks, p: int, name: str, how: str) -> None:
    """transformers' own, hybrid and pure (their norms and their loss are float32), with FSDP2 and
    checkpoints where they are parallelized."""
    want = run_library(0, name, "parallelize")
    for rank, got in enumerate(ranks(p).run(run_library, p, name, how, timeout=900)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert not got["gathered"]
