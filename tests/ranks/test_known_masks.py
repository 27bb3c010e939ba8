"""Masks that are known when compiling, whose keys are sent to who sees them, on real ranks."""

from __future__ import annotations

import known_jobs as jobs
import pytest
from sampling import FULL


@pytest.mark.parametrize(("p", "every"), [(4, 18), FULL(3, 3), FULL(4, 1), FULL(8, 5)])
def test_equals_one_process(ranks, p: int, every: int) -> None:
    for answer in ranks(p).run(jobs.differences, p, every, timeout=900):
        assert not {case: d for case, d in answer.items() if not d < 1e-11}
