"""An attention's log-sum-exp, where it is read: by every method, with its gradient, in float64."""

from __future__ import annotations

import lse_jobs as jobs
import pytest
from sampling import FULL
from test_attention import check


@pytest.mark.parametrize("p, every", [FULL(1, True), FULL(2, True), (3, False), FULL(4, True)])
def test_every_method_gives_it(ranks, p: int, every: bool) -> None:
    check(ranks(p).run(jobs.lse_cases, every, timeout=900))
