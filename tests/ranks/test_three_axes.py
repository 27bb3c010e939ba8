"""Replicas x a cut sequence x tensor parallelism on one mesh: losses and gradients are those of one
process with all batches."""

from __future__ import annotations

import pytest
import three_axes_jobs as jobs
from compare import assert_close, compare_gradients
from sampling import FULL


@pytest.mark.parametrize(
    "dp, sp, tp, how, plan",
    [
        (2, 1, 2, "fsdp", "blocks"),
        FULL(2, 1, 2, "hsdp", "blocks"),
        *(FULL(2, 2, 2, how, "blocks") for how in ("compile", "parallelize", "fsdp", "hsdp")),
        FULL(2, 2, 2, "compile", "embedding, head"),
        FULL(2, 2, 2, "fsdp", "embedding, head"),
        FULL(1, 2, 2, "fsdp", "blocks"),
    ],
)
def test_two_steps(ranks, dp: int, sp: int, tp: int, how: str, plan: str) -> None:
    want = jobs.trained(dp, 0, 0, plan=plan)
    every = ranks(dp * sp * tp).run(jobs.trained, dp, sp, tp, how, plan, timeout=500)
    losses = zip(*(got["losses"] for got in every), strict=True)
    for mine, expected in zip(losses, want["losses"], strict=True):
        assert_close("mean loss", sum(mine) / len(mine), expected, 1e-12)
    for got in every:
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert got["parts"] > 0
