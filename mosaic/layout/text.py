"""What the ranks hold, as short text: ``0:2+2,4094:4096-2*1023|2046:2050``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mosaic.layout.intervals import Interval, Intervals

#: So many evenly spaced ranks are written as one: the text is as long for 1,024 ranks as for 8.
EVENLY = 8


def evenly(ranks: Sequence[Intervals], at: int) -> tuple[int, tuple[int, ...]]:
    """How many ranks from ``at`` on hold what the one before holds, each interval moved by the same
    spacing, and these spacings."""
    first, second = ranks[at], ranks[at + 1] if at + 1 < len(ranks) else ()
    if len(first) != len(second):
        return 1, ()
    spacings = tuple(b.start - a.start for a, b in zip(first, second, strict=True))
    count, moved = 1, first
    while True:
        moved = tuple(Interval(a + by, b + by) for (a, b), by in zip(moved, spacings, strict=True))
        if at + count >= len(ranks) or ranks[at + count] != moved:
            return count, spacings
        count += 1


def written(held: Intervals, spacings: tuple[int, ...], count: int) -> str:
    if count == 1:
        return ",".join(f"{a}:{b}" for a, b in held)
    moved = zip(held, spacings, strict=True)
    return f"{','.join(f'{a}:{b}{by:+}' for (a, b), by in moved)}*{count}"


def read(text: str) -> list[list[tuple[int, int]]]:
    """What the ranks hold that ``written`` wrote. Raises ValueError for other texts."""
    intervals, _, count = text.partition("*")
    numbers = []
    for part in filter(None, intervals.split(",")):
        match = re.fullmatch(r"(\d+):(\d+)([+-]\d+)?", part)
        if match is None:
            raise ValueError(f"{part!r} is no interval")
        numbers.append((int(match[1]), int(match[2]), int(match[3] or 0)))
    return [[(a + i * by, b + i * by) for a, b, by in numbers] for i in range(int(count or 1))]
