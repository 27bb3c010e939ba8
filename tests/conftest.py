"""What every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch
from rank_pool import RankPool

gc.freeze()  # collections, of which compilers cause many, need not look at what is imported
gc.set_threshold(50_000, 20, 20)

# Ranks are forked from this process, which is safe only while OpenMP has no threads here.
torch.set_num_threads(1)

# The first call of a torch op may take longer than the deadline of an example.
hypothesis.settings.register_profile("mosaic", deadline=None)
hypothesis.settings.load_profile("mosaic")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(p)`` is the pool of p gloo ranks; each is started once and serves all tests."""
    pools: dict[int, RankPool] = {}

    def pool(p: int) -> RankPool:
        return pools.setdefault(p, RankPool(p))

    yield pool
    for started in pools.values():
        started.close()
