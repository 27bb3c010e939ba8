"""What the fuzzer has found stays mended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.found import FOUND
from fuzz.judge import judge
from fuzz.ranks import FuzzRanks
from rank_pool import RankPool


@pytest.fixture(scope="module")
def two() -> Iterator[FuzzRanks]:
    ranks = FuzzRanks(RankPool(2))
    yield ranks
    ranks.pool.close()


@pytest.mark.parametrize("cause", list(FOUND))
def test_found(two, cause: str) -> None:
    program = FOUND[cause]
    verdict = two.try_out(judge, program.source)
    assert verdict.outcome == "ok", f"{verdict.outcome}: {verdict.detail}\n{program.source}"
