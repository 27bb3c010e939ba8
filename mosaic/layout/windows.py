"""Windows that slide over an axis: which rank makes which outputs, and what it needs for them.

Convolutions, pools and ``unfold`` read, for output i, the inputs ``i * stride - before`` up to
``size`` further. Pure Python, no torch.

>>> windows = Windows(n=7, m=7, size=3, stride=1, before=1)
>>> outputs = windows.outputs(Layout.even(7, 2), Layout.even(7, 2))
>>> print(outputs, windows.needed(outputs))
7=0:4|4:7 7=0:5|3:7
>>> windows.parts(outputs, 0)
[Part(start=0, stop=5, before=1, after=0)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mosaic.layout import Interval, Layout, Run, joined_runs, placed, united
from mosaic.layout.intervals import intersection


class Part(NamedTuple):
    """What one interval of outputs is made of: a stretch of this rank's memory, and fill."""

    start: int
    stop: int
    before: int
    after: int


@dataclass(frozen=True)
class Windows:
    """``m`` windows over an axis of length ``n``, which begins ``before`` places further left."""

    n: int
    m: int
    size: int
    stride: int
    before: int

    def outputs(self, source: Layout, base: Layout) -> Layout:
        """Who makes which outputs: as the inputs are cut, or the axis, where the length allows it;
        else whoever holds the input at ``i * stride``."""
        same = next((layout for layout in (source, base) if layout.n == self.m), None)
        if same is not None:
            return same
        made = source.slice(0, min(self.m * self.stride, self.n), self.stride)
        last = max((r for r in range(made.p)), key=lambda r: max(made.ranks[r], default=(-1, -1)))
        extra: list[list[Interval]] = [[] for _ in range(made.p)]
        extra[last] = [Interval(made.n, self.m)]
        return Layout.of(self.m, ([*r, *e] for r, e in zip(made.ranks, extra, strict=True)))

    def read(self, outputs: Interval) -> Interval:
        """The inputs of these outputs; some may lie before the axis or behind it."""
        start = outputs.start * self.stride - self.before
        return Interval(start, start + (outputs.length - 1) * self.stride + self.size)

    def inside(self, outputs: Interval) -> Interval:
        start, stop = self.read(outputs)
        start, stop = max(0, start), min(stop, self.n)
        return Interval(start, stop) if start < stop else Interval(0, 0)

    def needed(self, outputs: Layout) -> Layout:
        """What each rank reads; ranks overlap."""
        return Layout(self.n, tuple(united(map(self.inside, r)) for r in outputs.ranks))

    def parts(self, outputs: Layout, rank: int) -> list[Part]:
        """For each interval of this rank's outputs, out of the memory of ``needed``."""
        held = placed(self.needed(outputs).ranks[rank])
        return [self.part(interval, held) for interval in outputs.ranks[rank]]

    def part(self, outputs: Interval, held: list[tuple[Interval, Run]]) -> Part:
        read, inside = self.read(outputs), self.inside(outputs)
        if not inside.length:
            return Part(0, 0, read.length, 0)
        first = next(
            run.start + inside.start - interval.start
            for interval, run in held
            if interval.start <= inside.start < interval.stop
        )
        before, after = inside.start - read.start, read.stop - inside.stop
        return Part(first, first + inside.length, before, after)


# --- the way back -------------------------------------------------------------------------------


class Return(NamedTuple):
    """One rank's side of an all-to-all that undoes an exchange to an overlapping layout, in
    elements of the axis: ``add`` gives, for each stretch of the source's memory, where in the
    receive buffer the terms of its sum begin."""

    take: tuple[Run, ...]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    add: tuple[tuple[Run, tuple[int, ...]], ...]


def returned(source: Layout, target: Layout, rank: int) -> Return:
    """What ``rank`` sends back to the owners of what it read, and adds up of what it owns."""
    take, send, receive, terms, offset = [], [], [], [], 0
    for peer in range(source.p):
        read = shared(source, peer, target, rank)
        take += [target.runs(rank, *piece)[0] for piece in read]
        send.append(sum(piece.length for piece in read))
        lent = shared(source, rank, target, peer)
        receive.append(sum(piece.length for piece in lent))
        for piece in lent:
            terms.append((source.runs(rank, *piece)[0], offset))
            offset += piece.length
    add = stretches(terms, source.lengths[rank])
    return Return(joined_runs(take), tuple(send), tuple(receive), add)


def shared(source: Layout, owner: int, target: Layout, reader: int) -> list[Interval]:
    """What ``reader`` needs of what ``owner`` holds, in the order of the axis."""
    both = (intersection(a, b) for a in source.ranks[owner] for b in target.ranks[reader])
    return sorted(piece for piece in both if piece.length > 0)


def stretches(
    terms: Sequence[tuple[Run, int]], length: int
) -> tuple[tuple[Run, tuple[int, ...]], ...]:
    """Cut memory where a term begins or ends: every stretch with the offsets of its terms."""
    bounds = sorted({0, length, *(b for run, _ in terms for b in (run.start, run.stop))})
    return tuple(
        (
            Run(a, b),
            tuple(at + a - run.start for run, at in terms if run.start <= a and b <= run.stop),
        )
        for a, b in pairwise(bounds)
    )
