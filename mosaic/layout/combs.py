"""Many stretches of memory, evenly spaced, as one: what p ranks have of an axis, for any p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mosaic.layout.intervals import Run


class Tooth(NamedTuple):
    """Stretches of ``length`` elements; each begins ``spacing`` after (or before) the last."""

    start: int
    length: int
    spacing: int


class Comb(NamedTuple):
    """``repeats`` stretches of each tooth in turn: first those of all teeth that come first."""

    repeats: int
    teeth: tuple[Tooth, ...]


def combs(runs: Sequence[Run], least: int) -> list[Run | Comb]:
    """The same stretches, with ``least`` or more that are evenly spaced as one comb. Layouts that
    are cut evenly make a few combs, for any number of ranks; zigzag ones have two teeth.

    >>> combs([Run(0, 2), Run(9, 11), Run(7, 9), Run(5, 7)], 3)
    [Run(start=0, stop=2, step=1), Comb(repeats=3, teeth=(Tooth(start=9, length=2, spacing=-2),))]
    """
    out: list[Run | Comb] = []
    if len(runs) < least:  # eager attention comes by here at every call
        return [*runs]
    at = 0
    while at < len(runs):
        best = max((_comb(runs, at, teeth) for teeth in (1, 2)), key=lambda c: c.repeats)
        out.append(best if best.repeats >= least else runs[at])
        at += best.repeats * len(best.teeth) if best.repeats >= least else 1
    return out


def _comb(runs: Sequence[Run], at: int, teeth: int) -> Comb:
    """The longest comb of so many teeth that begins with ``runs[at]``."""
    first, second = runs[at : at + teeth], runs[at + teeth : at + 2 * teeth]
    found = tuple(
        Tooth(a.start, a.length, b.start - a.start) for a, b in zip(first, second, strict=False)
    )
    if len(found) < teeth or not all(tooth.spacing for tooth in found):
        return Comb(1, (Tooth(first[0].start, first[0].length, 0),))
    count = 1
    while [
        (run.start, run.stop) for run in runs[at + count * teeth : at + (count + 1) * teeth]
    ] == [
        (start + count * spacing, start + count * spacing + length)
        for start, length, spacing in found
    ]:
        count += 1
    return Comb(count, found)
