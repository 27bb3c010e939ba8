"""Stretches of an axis, and of a rank's memory. Pure Python, no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import NamedTuple


class Interval(NamedTuple):
    """The indices ``start <= i < stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


Intervals = tuple[Interval, ...]


class Run(NamedTuple):
    """A stretch of one rank's memory: elements ``start, start + step, ... < stop``."""

    start: int
    stop: int
    step: int = 1

    @property
    def length(self) -> int:
        """From start to stop; the elements, where the step is 1."""
        return self.stop - self.start


def joined(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Drop empty intervals and join those that touch: one normal form, so that == is equality."""
    out: list[Interval] = []
    begin, end = None, 0
    for start, stop in intervals:
        if start >= stop:
            continue
        if begin is None or start != end:
            if begin is not None:
                out.append(Interval(begin, end))
            begin = start
        end = stop
    return (*out, Interval(begin, end)) if begin is not None else ()


def united(intervals: Iterable[Interval]) -> Intervals:
    """Sorted, with those that touch or overlap as one."""
    out: list[Interval] = []
    for start, stop in sorted(i for i in intervals if i.length):
        if out and start <= out[-1].stop:
            out[-1] = Interval(out[-1].start, max(stop, out[-1].stop))
        else:
            out.append(Interval(start, stop))
    return tuple(out)


def common(held: Intervals, wanted: Intervals) -> Intervals:
    """What is held of what is wanted (in ascending order), in the order in which it is held."""
    parts = placed(wanted)
    return joined(piece for interval in held for piece, _ in cut(parts, interval))


def joined_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join each run with the one before it where they touch."""
    out: list[Run] = []
    for run in runs:
        if out and run.step == out[-1].step == 1 and out[-1].stop == run.start:
            out[-1] = Run(out[-1].start, run.stop)
        else:
            out.append(run)
    return tuple(out)


def placed(intervals: Intervals, offset: int = 0) -> list[tuple[Interval, Run]]:
    """Each interval with its stretch of memory; the first one begins at ``offset``."""
    bounds = accumulate((interval.length for interval in intervals), initial=offset)
    return [(i, Run(*run)) for i, run in zip(intervals, pairwise(bounds), strict=True)]


def intersection(a: Interval, b: Interval) -> Interval:
    return Interval(max(a.start, b.start), min(a.stop, b.stop))


def cut(held: Sequence[tuple[Interval, Run]], wanted: Interval) -> Iterator[tuple[Interval, Run]]:
    """What is wanted of intervals in ascending order, each with its stretch of memory."""
    at = max(bisect_right(held, wanted.start, key=lambda part: part[0].start) - 1, 0)
    for interval, run in islice(held, at, None):
        if interval.start >= wanted.stop:
            return
        piece = intersection(interval, wanted)
        if piece.length > 0:
            start = run.start + piece.start - interval.start
            yield piece, Run(start, start + piece.length)
