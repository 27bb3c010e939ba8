"""Less is kept for backward as torch does it, exactly; attention is never run twice; and the plan
counts what is kept, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import memory_jobs as jobs
import pytest
from compare import compare_gradients

FULL = pytest.mark.full
LESS = [way for way in jobs.WAYS if way != "all"]
CI = ("budget 0", "save_on_cpu", "attention")
in_one_process = cache(jobs.stepped)


@pytest.fixture(scope="module")
def keeping_all(ranks) -> Callable[[int], list[dict[str, Any]]]:
    """What each of p ranks does where nothing is said of memory."""
    return cache(lambda p: ranks(p).run(jobs.stepped, p, "all"))


@pytest.mark.parametrize("way", [w if w in CI else pytest.param(w, marks=FULL) for w in LESS])
@pytest.mark.parametrize("p", [2, pytest.param(1, marks=FULL), pytest.param(3, marks=FULL)])
def test_keeping_less_is_exact_and_runs_no_attention_again(
    ranks, keeping_all, p: int, way: str
) -> None:
    want = in_one_process(None, "all")
    for plain, less in zip(keeping_all(p), ranks(p).run(jobs.stepped, p, way), strict=True):
        assert abs(less["loss"] - want["loss"]) < 1e-12
        compare_gradients(want["gradients"], less["gradients"], 1e-11)
        assert less["forward"] == plain["forward"]
        assert less["backward"] == plain["backward"]  # no forward of an attention, nothing sent


@pytest.mark.parametrize("way", ["all", "checkpoint", pytest.param("budget 0.5", marks=FULL)])
@pytest.mark.parametrize("p", [2, pytest.param(1, marks=FULL), pytest.param(3, marks=FULL)])
def test_the_plan_counts_what_is_kept(ranks, p: int, way: str) -> None:
    for planned, compiled, held in ranks(p).run(jobs.counted_and_held, p, way):
        assert planned == compiled == held
