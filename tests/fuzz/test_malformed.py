"""Random wrong calls on two ranks: fine, or a MosaicError with a fix; never a hang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.draw import drawn
from fuzz.malformed import generate_call, judge_call
from fuzz.ranks import BAD, FuzzRanks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool


@pytest.fixture(scope="module")
def two() -> Iterator[FuzzRanks]:
    ranks = FuzzRanks(RankPool(2))
    yield ranks
    ranks.pool.close()


def test_twenty_wrong_calls(two) -> None:
    fuzz(two, 20)


@pytest.mark.full
def test_five_hundred_wrong_calls(two) -> None:
    fuzz(two, 500)


def fuzz(ranks: FuzzRanks, count: int) -> None:
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data) -> None:
        source = generate_call(drawn(data))
        verdict = ranks.try_out(judge_call, source)
        assert verdict.outcome not in BAD, f"{verdict.outcome}: {verdict.detail}\n{source}"

    run()
