"""Tensor parallelism over a mesh axis beside the one that cuts the sequence: gradients are those of
one process."""

from __future__ import annotations

import pytest
import tensor_parallel_jobs as jobs
from compare import assert_close, compare_gradients
from sampling import FULL


@pytest.mark.parametrize("how", ["fsdp"])
@pytest.mark.parametrize("sp, tp", [(2, 2), (1, 2)])
def test_two_steps(ranks, sp: int, tp: int, how: str) -> None:
    want = jobs.trained(0, 0)
    for got in ranks(sp * tp).run(jobs.trained, sp, tp, how):
        for mine, theirs in zip(got["losses"], want["losses"], strict=True):
            assert_close("loss", mine, theirs, 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert got["gathered"] == []
