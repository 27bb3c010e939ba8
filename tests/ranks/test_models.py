"""Unmodified models on real ranks: the loss and every gradient are those of one process.

CI runs every model on three ranks, two of them through Inductor; ``pytest -m full`` all.
"""

from __future__ import annotations

from functools import partial

import pytest
from cases import CASES
from compare import assert_close, compare_gradients
from model_jobs import run_model


def tolerance(name: str) -> float:
    """Our models run in float64, transformers' in float32."""
    return 1e-5 if name.startswith("hf_") else 1e-10


def check(ranks, name: str, p: int, inner: str = "eager", **sizes: int) -> None:
    build, spec = CASES[name]
    build = partial(build, **sizes)
    options = {"inner": inner, **({"spec": spec} if spec else {})}
    want = run_model(build, None)
    for rank, got in enumerate(ranks(p).run(run_model, build, options, p, timeout=900)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], tolerance(name))
        compare_gradients(want["gradients"], got["gradients"], tolerance(name))


@pytest.mark.parametrize("name", CASES)
def test_three_ranks(ranks, name: str) -> None:
    check(ranks, name, 3)


@pytest.mark.parametrize("name", ["gpt", "table"])
def test_through_inductor(ranks, name: str) -> None:
    """Equal shards, which share their compiled kernels: uneven ones take thrice as long."""
    check(ranks, name, 3, "inductor", **({"rows": 36} if name == "table" else {"n": 36}))


@pytest.mark.full
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_matrix(ranks, name: str, p: int, batch: int, inner: str) -> None:
    if name == "table_tiny" and batch == 3:
        pytest.skip("the tiny table is about empty shards, not about batches")
    check(ranks, name, p, inner, batch=batch)
