"""Stretches of memory, taken one by one or as combs: the same elements in the same order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic.layout import Comb, Layout, Run, combs, exchange
from mosaic.runtime import comm


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    """Stretches of 200 elements in any order, some of them evenly spaced with one or two teeth."""
    found: list[Run] = []
    for _ in range(draw(st.integers(0, 4))):
        teeth = draw(st.integers(1, 3))
        starts = draw(st.lists(st.integers(50, 150), min_size=teeth, max_size=teeth))
        spacings = draw(st.lists(st.integers(-5, 5), min_size=teeth, max_size=teeth))
        length = draw(st.integers(1, 9))
        for i in range(draw(st.integers(1, 6))):
            pairs = zip(starts, spacings, strict=True)
            found += [Run(a + i * by, a + i * by + length) for a, by in pairs]
    return found


@given(runs(), st.integers(0, 1))
def test_combs_take_the_same_elements(taken, dim):
    x = torch.arange(400).view(2, 200) if dim else torch.arange(400).view(200, 2)
    want = [x.narrow(dim, run.start, run.length) for run in taken]
    want = torch.cat(want, dim) if want else x.narrow(dim, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "MANY", 2)
        assert torch.equal(comm.take_runs(x, taken, dim), want)


@pytest.mark.parametrize("p", [16, 1024])
@pytest.mark.parametrize("cut", [Layout.even, Layout.zigzag])
def test_evenly_cut_ranks_are_a_few_combs(p, cut):
    layout = cut(2 * p + 3, p)
    gathered = [run for _, run in layout.gather_order()]
    order = [
        Run(r * 4 + a, r * 4 + b)
        for (r, _), (a, b, _) in zip(layout.gather_order(), gathered, strict=True)
    ]
    assert len(combs(order, comm.MANY)) < 8


def test_an_exchange_is_a_few_combs():
    """From even to zigzag and back, for 1,024 ranks: a rank talks to a few others."""
    even, zigzag = Layout.even(8192, 1024), Layout.zigzag(8192, 1024)
    for source, target in ((even, zigzag), (zigzag, even)):
        plan = exchange(source, target, 500)
        assert len(plan.take) <= 4 and len(plan.place) <= 4
        assert sum(map(bool, plan.send)) <= 4


def test_two_teeth_are_one_comb():
    """What a zigzag rank sends to each of many: a piece from its first chunk, one from its last."""
    going = [
        run for i in range(20) for run in (Run(4 * i, 4 * i + 2), Run(200 - 4 * i, 202 - 4 * i))
    ]
    (comb,) = combs(going, 8)
    assert isinstance(comb, Comb) and comb.repeats == 20 and len(comb.teeth) == 2
