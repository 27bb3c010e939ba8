"""Every collective, and its gradient, against one process; and the pass that orders them."""

from __future__ import annotations

import collective_jobs as jobs
import pytest
from sampling import FULL


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_adjoint_pairs(ranks, p: int) -> None:
    for rank, errors in enumerate(ranks(p).run(jobs.everything, timeout=40)):
        assert not {case: error for case, error in errors.items() if not error < 1e-12}, rank


@pytest.mark.parametrize("inner", ["eager", FULL("inductor")])
def test_lowered_after_autograd(ranks, inner: str) -> None:
    for errors, targets in ranks(3).run(jobs.lowered, inner, timeout=90):
        assert not {case: error for case, error in errors.items() if not error < 1e-12}
        assert not any(t.startswith("mosaic.") for graph in targets.values() for t in graph)
        # The gradients of w and b leave in one bucket, and are waited for at the very end.
        assert targets["backward"].count("_c10d_functional.all_reduce_coalesced.default") == 1
        assert targets["backward"][-1] == "_c10d_functional.wait_tensor.default"
