"""Windows over a cut axis: every output is made once, of what it reads, and gradients go back."""

from __future__ import annotations

from itertools import product

import pytest

from mosaic.layout import Layout
from mosaic.layout.windows import Windows, returned

LAYOUTS = [
    Layout.even(11, 3),
    Layout.zigzag(11, 3),
    Layout.even(4, 3),
    Layout.even(11, 3).reversed,
    Layout.of(6, [[(4, 6)], [], [(0, 4)]]),
]


def made(n: int) -> list[Windows]:
    """Every window that a convolution over n could have, small."""
    found = []
    for size, stride, before in product((1, 2, 3, 7), (1, 2, 3), (0, 1, 5)):
        m = (n + 2 * before - size) // stride + 1
        if m > 0:
            found.append(Windows(n, m, size, stride, before))
    return found


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_output_is_made_once_of_what_it_reads(source: Layout) -> None:
    for windows in made(source.n):
        outputs = windows.outputs(source, source)
        assert outputs.is_partition and outputs.n == windows.m
        needed = windows.needed(outputs)
        for rank in range(source.p):
            memory = needed.indices(rank)
            for interval, part in zip(
                outputs.ranks[rank], windows.parts(outputs, rank), strict=True
            ):
                read = [None] * part.before + memory[part.start : part.stop] + [None] * part.after
                first = interval.start * windows.stride - windows.before
                length = (interval.length - 1) * windows.stride + windows.size
                places = range(first, first + length)
                assert read == [i if 0 <= i < windows.n else None for i in places]


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_what_was_lent_comes_back(source: Layout) -> None:
    """The adjoint by hand: each owner adds up what every reader has of each of its rows."""
    for windows in made(source.n):
        needed = windows.needed(windows.outputs(source, source))
        steps = [returned(source, needed, rank) for rank in range(source.p)]
        sent = []  # by sender and receiver: (reader, row)
        for rank, step in enumerate(steps):
            held = needed.indices(rank)
            rows = [(rank, held[i]) for run in step.take for i in range(run.start, run.stop)]
            sent.append([[rows.pop(0) for _ in range(n)] for n in step.send])
            assert not rows
        for rank, step in enumerate(steps):
            buffer = [row for sender in sent for row in sender[rank]]
            assert len(buffer) == sum(step.receive)
            owned = source.indices(rank)
            for run, offsets in step.add:
                for k, row in enumerate(owned[run.start : run.stop]):
                    terms = sorted(buffer[at + k] for at in offsets)
                    assert terms == [(r, row) for r in range(source.p) if row in needed.indices(r)]
