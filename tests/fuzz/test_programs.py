"""Random programs on real ranks: never wrong, dead, hung or crashed; refused in clear words.

A failure prints the smallest program that hypothesis found; save its text and replay it with
``cd tests && python -m fuzz --replay program.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from fuzz.draw import drawn
from fuzz.generate import MESHES, generate
from fuzz.judge import judge
from fuzz.program import Program
from fuzz.ranks import BAD, FuzzRanks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool


@pytest.fixture(scope="module")
def fuzz_ranks() -> Iterator[Callable[[str], FuzzRanks]]:
    started: dict[str, FuzzRanks] = {}

    def of(mesh: str) -> FuzzRanks:
        return started.setdefault(mesh, FuzzRanks(RankPool(MESHES[mesh].count)))

    yield of
    for ranks in started.values():
        ranks.pool.close()


@pytest.mark.parametrize(("mesh", "count"), [("2", 3), ("3", 2), ("2x2", 1)])
def test_six_programs(fuzz_ranks, mesh: str, count: int) -> None:
    fuzz(fuzz_ranks(mesh), mesh, count)


@pytest.mark.full
@pytest.mark.parametrize(("mesh", "count"), [("2", 1500), ("3", 1000), ("2x2", 500)])
def test_three_thousand_programs(fuzz_ranks, mesh: str, count: int) -> None:
    fuzz(fuzz_ranks(mesh), mesh, count)


def fuzz(ranks: FuzzRanks, mesh: str, count: int) -> None:
    outcomes: Counter[str] = Counter()

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
        program = made(data, mesh)
        verdict = ranks.try_out(judge, program.source)
        outcomes[verdict.outcome] += 1
        assert verdict.outcome not in BAD, f"{verdict.outcome}: {verdict.detail}\n{program.source}"

    run()
    told = outcomes["ok"] + outcomes["refused"]
    assert outcomes["ok"] > 0.3 * told, f"most of it says nothing: {dict(outcomes)}"


def made(data, mesh: str) -> Program:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return generate(drawn(data), mesh)
    finally:
        torch.set_default_dtype(before)
