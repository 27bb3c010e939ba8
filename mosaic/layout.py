"""Who holds which indices of an axis: intervals, layouts and places. Pure Python, no torch.

Vocabulary, used in code, docs and messages:

axis       a named dimension of the user's program (``rows``)
mesh axis  a dimension of the device mesh (``sp``)
rank       one process of that mesh axis
layout     for every rank, the global intervals of an axis that it holds, in memory order
place      where an axis sits in one tensor: dim ``dim`` has size outer x layout.n x inner
whole      every rank has all of it
reshard    to change a layout

>>> print(Layout.even(37, 4))
37=0:10|10:20|20:30|30:37
>>> print(Layout.zigzag(16, 4))
16=0:2,14:16|2:4,12:14|4:6,10:12|6:10
>>> print(Layout.even(37, 4).slice(0, 26))
26=0:10|10:20|20:26|
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, islice, pairwise, product
from math import gcd
from typing import NamedTuple

from mosaic.errors import ShardingError


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


def _joined(intervals: Iterable[tuple[int, int]]) -> Intervals:
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
    return _joined(piece for interval in held for piece, _ in cut(parts, interval))


def joined_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join each run with the one before it where they touch."""
    out: list[Run] = []
    for run in runs:
        if out and run.step == out[-1].step == 1 and out[-1].stop == run.start:
            out[-1] = Run(out[-1].start, run.stop)
        else:
            out.append(run)
    return tuple(out)


class Tooth(NamedTuple):
    """Stretches of ``length`` elements; each begins ``spacing`` after (or before) the last."""

    start: int
    length: int
    spacing: int


class Comb(NamedTuple):
    """``count`` stretches of each tooth in turn: first those of all teeth that come first."""

    count: int
    teeth: tuple[Tooth, ...]


def combs(runs: Sequence[Run], least: int) -> list[Run | Comb]:
    """The same stretches, with ``least`` or more that are evenly spaced as one comb. Layouts that
    are cut evenly make a few combs, for any number of ranks; zigzag ones have two teeth.

    >>> combs([Run(0, 2), Run(9, 11), Run(7, 9), Run(5, 7)], 3)
    [Run(start=0, stop=2, step=1), Comb(count=3, teeth=(Tooth(start=9, length=2, spacing=-2),))]
    """
    out: list[Run | Comb] = []
    at = 0
    while at < len(runs):
        best = max((_comb(runs, at, teeth) for teeth in (1, 2)), key=lambda c: c.count)
        out.append(best if best.count >= least else runs[at])
        at += best.count * len(best.teeth) if best.count >= least else 1
    return out


def _comb(runs: Sequence[Run], at: int, teeth: int) -> Comb:
    """The longest comb of so many teeth that begins with ``runs[at]``."""
    first, second = runs[at : at + teeth], runs[at + teeth : at + 2 * teeth]
    found = tuple(
        Tooth(a.start, a.stop - a.start, b.start - a.start)
        for a, b in zip(first, second, strict=False)
    )
    if len(found) < teeth or not all(tooth.spacing for tooth in found):
        return Comb(1, (Tooth(first[0].start, first[0].stop - first[0].start, 0),))
    count = 1
    while [
        (run.start, run.stop) for run in runs[at + count * teeth : at + (count + 1) * teeth]
    ] == [
        (start + count * spacing, start + count * spacing + length)
        for start, length, spacing in found
    ]:
        count += 1
    return Comb(count, found)


def placed(intervals: Intervals, offset: int = 0) -> list[tuple[Interval, Run]]:
    """Each interval with its stretch of memory; the first one begins at ``offset``."""
    bounds = accumulate((interval.length for interval in intervals), initial=offset)
    return [(i, Run(*run)) for i, run in zip(intervals, pairwise(bounds), strict=True)]


def _intersect(a: Interval, b: Interval) -> Interval:
    return Interval(max(a.start, b.start), min(a.stop, b.stop))


def _check_sizes(n: int, p: int, multiple_of: int = 1) -> None:
    """Raise ShardingError unless they are whole numbers, none too small."""
    named = (("n", n, 0), ("p", p, 1), ("multiple_of", multiple_of, 1))
    for name, size, least in named:
        try:
            is_number = operator.index(size) >= least
        except (TypeError, ValueError):
            is_number = False
        if not is_number:
            raise ShardingError(
                f"{name} = {size!r} in a layout", fix=f"use a whole number, {least} or more"
            )


@dataclass(frozen=True)
class Layout:
    """Which indices of an axis of length ``n`` each rank holds, in the order of its memory.

    Usually a partition. Where a slice is pushed up to a leaf it may leave indices out, and for a
    whole axis every rank holds everything.
    """

    n: int
    ranks: tuple[Intervals, ...]

    # --- making one ------------------------------------------------------------------------

    @classmethod
    def of(cls, n: int, ranks: Iterable[Iterable[tuple[int, int]]]) -> Layout:
        """From each rank's (start, stop)."""
        _check_sizes(n, 1)
        try:
            return cls(n, tuple(_joined(r) for r in ranks))
        except (TypeError, ValueError) as error:
            raise ShardingError(
                "a layout takes a list of (start, stop) for each rank",
                fix="write Layout.of(4, [[(0, 2)], [(2, 4)]])",
            ) from error

    @classmethod
    def even(cls, n: int, p: int, multiple_of: int = 1) -> Layout:
        """``torch.chunk``'s cut: 37 over 4 is 10, 10, 10, 7; 9 over 4 is 3, 3, 3, 0. Raises
        ShardingError for sizes that are none."""
        _check_sizes(n, p, multiple_of)
        chunk = -(-n // (p * multiple_of)) * multiple_of
        return cls.of(n, ([(min(r * chunk, n), min((r + 1) * chunk, n))] for r in range(p)))

    @classmethod
    def zigzag(cls, n: int, p: int, multiple_of: int = 1) -> Layout:
        """Causal balance: of 2p even chunks rank r holds r and 2p-1-r."""
        _check_sizes(n, p, multiple_of)
        chunks = [c[0] if c else (0, 0) for c in cls.even(n, 2 * p, multiple_of).ranks]
        return cls.of(n, ([chunks[r], chunks[2 * p - 1 - r]] for r in range(p)))

    @classmethod
    def whole(cls, n: int, p: int) -> Layout:
        _check_sizes(n, p)
        return cls.of(n, ([(0, n)] for _ in range(p)))

    @classmethod
    def grid(cls, rows: Layout, cols: Layout) -> Layout:
        """Two axes as one of rows.n x cols.n, over ranks r * cols.p + c: each holds, row by row,
        its columns of its rows.

        >>> print(Layout.grid(Layout.even(2, 2), Layout.even(3, 2)))
        6=0:2|2:3|3:5|5:6
        """
        ranks = product(range(rows.p), range(cols.p))
        return cls.crossed(rows.blocks(1, cols.n), cols.blocks(rows.n, 1), ranks)

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Layout:
        """Read what ``str`` wrote."""
        n, ranks = text.split("=")
        return cls.of(int(n), (held for part in ranks.split("|") for held in _read(part)))

    def __str__(self) -> str:
        """``16=0:2,14:16|2:4,12:14|4:6,10:12|6:10``. Eight and more neighbouring ranks whose
        intervals are evenly spaced are written as one, with the spacings and their number.

        >>> print(Layout.zigzag(4096, 1024))
        4096=0:2+2,4094:4096-2*1023|2046:2050
        """
        parts, at = [], 0
        while at < self.p:
            count, spacings = _evenly(self.ranks, at)
            count = count if count >= EVENLY else 1
            parts.append(_written(self.ranks[at], spacings, count))
            at += count
        return f"{self.n}={'|'.join(parts)}"

    # --- reading it ------------------------------------------------------------------------

    @property
    def p(self) -> int:
        return len(self.ranks)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sum(i.length for i in r) for r in self.ranks)

    @cached_property
    def is_partition(self) -> bool:
        """Whether every index is held exactly once."""
        held = [Interval(0, 0), *sorted(i for r in self.ranks for i in r)]
        return sum(self.lengths) == self.n and all(a.stop == b.start for a, b in pairwise(held))

    def is_within(self, other: Layout) -> bool:
        """Whether every rank of ``other`` holds what it holds here: nothing has to be sent."""
        return all(
            sum(piece.length for i in mine for piece, _ in cut(sorted(placed(held)), i)) == length
            for mine, held, length in zip(self.ranks, other.ranks, self.lengths, strict=True)
        )

    @property
    def is_cut(self) -> bool:
        """Whether the ranks hold parts, and not all of it each."""
        return self.p > 1 and self.is_partition

    @cached_property
    def _ascending(self) -> list[tuple[int, int, int]]:
        """(start, stop, rank) of every interval."""
        return sorted((*i, rank) for rank, held in enumerate(self.ranks) for i in held)

    def holders(self, intervals: Intervals) -> set[int]:
        """The ranks that hold something of these."""
        longest = max((stop - start for start, stop, _ in self._ascending), default=0)
        found = set()
        for start, stop in intervals:
            first = bisect_left(self._ascending, (start - longest,))
            last = bisect_left(self._ascending, (stop,))
            found |= {rank for _, end, rank in self._ascending[first:last] if end > start}
        return found

    def indices(self, rank: int) -> list[int]:
        return [i for interval in self.ranks[rank] for i in range(*interval)]

    # --- the algebra -----------------------------------------------------------------------

    def slice(self, start: int, stop: int, step: int = 1) -> Layout:
        """The layout of ``x[start:stop:step]`` when x is not moved: intersect and shift."""

        def new(index: int) -> int:
            return max(0, -(-(index - start) // step))

        n = max(0, -(-(stop - start) // step))
        return Layout.of(n, ([(new(a), min(new(b), n)) for a, b in r] for r in self.ranks))

    def runs(self, rank: int, start: int, stop: int, step: int = 1) -> tuple[Run, ...]:
        """The stretches of ``rank``'s memory that ``x[start:stop:step]`` keeps."""
        out, offset = [], 0
        for a, b in self.ranks[rank]:
            first = start + max(0, -(-(a - start) // step)) * step
            last = min(b, stop)
            if first < last:
                out.append(Run(offset + first - a, offset + last - a, step))
            offset += b - a
        return joined_runs(out)

    def embed(self, start: int, n: int) -> Layout:
        """The same elements named as ``x[start:start + self.n]`` of a longer axis of length n."""
        return Layout.of(n, ([(a + start, b + start) for a, b in r] for r in self.ranks))

    @classmethod
    def concat(cls, parts: Sequence[Layout]) -> Layout:
        """The layout of a local ``cat``: each part's intervals, shifted by what is before it."""
        offsets = list(accumulate((part.n for part in parts), initial=0))
        return cls.of(
            offsets[-1],
            (
                [
                    (a + o, b + o)
                    for part, o in zip(parts, offsets, strict=False)
                    for a, b in part.ranks[r]
                ]
                for r in range(parts[0].p)
            ),
        )

    def scale(self, k: int) -> Layout:
        """Every index becomes k neighbouring ones (rows of patches -> patches)."""
        return Layout.of(self.n * k, ([(a * k, b * k) for a, b in r] for r in self.ranks))

    def blocks(self, outer: int, inner: int) -> Layout:
        """The layout of a whole dim in which the axis is a factor (outer x n x inner): in each of
        the outer blocks every rank's intervals, shifted and scaled.

        >>> print(Layout.even(3, 2).blocks(2, 1))
        6=0:2,3:5|2:3,5:6
        """
        size = self.n * inner
        return Layout.of(
            self.n * outer * inner,
            (
                [(o * size + a * inner, o * size + b * inner) for o in range(outer) for a, b in r]
                for r in self.ranks
            ),
        )

    def coarsen(self, k: int) -> Layout | None:
        """Undo ``scale``; None where an interval does not begin and end on a multiple of k."""
        if self.n % k or any(a % k or b % k for r in self.ranks for a, b in r):
            return None
        return Layout.of(self.n // k, ([(a // k, b // k) for a, b in r] for r in self.ranks))

    @classmethod
    def crossed(cls, a: Layout, b: Layout, ranks: Iterable[tuple[int, int]]) -> Layout:
        """Two axes of one dim: rank (i, j) holds what rank i of a and rank j of b both hold.

        >>> rows, columns = Layout.even(2, 2).blocks(1, 3), Layout.even(3, 2).blocks(2, 1)
        >>> print(Layout.crossed(rows, columns, [(0, 0), (0, 1), (1, 0), (1, 1)]))
        6=0:2|2:3|3:5|5:6
        """
        return cls.of(
            a.n,
            ([_intersect(x, y) for x in a.ranks[i] for y in b.ranks[j]] for i, j in ranks),
        )

    @property
    def is_ascending(self) -> bool:
        """Whether each rank's memory is in the order of the axis."""
        return all(list(r) == sorted(r) for r in self.ranks)

    @property
    def reversed(self) -> Layout:
        """The layout of ``x.flip`` when each rank flips what it holds."""
        return Layout.of(
            self.n, ([(self.n - b, self.n - a) for a, b in reversed(r)] for r in self.ranks)
        )

    @property
    def pieces(self) -> Layout:
        """The axis with one index for each interval, in the order of the axis."""
        order = sorted(i for r in self.ranks for i in r)
        number = {interval: k for k, interval in enumerate(order)}
        return Layout.of(len(order), ([(number[i], number[i] + 1) for i in r] for r in self.ranks))

    def gather_order(self) -> tuple[tuple[int, Run], ...]:
        """(rank, its stretch of memory), sorted so that their concatenation is the whole axis."""
        pieces = (
            (interval.start, rank, run)
            for rank, intervals in enumerate(self.ranks)
            for interval, run in placed(intervals)
        )
        return tuple((rank, run) for _, rank, run in sorted(pieces))


# --- as text -----------------------------------------------------------------------------------

#: So many evenly spaced ranks are written as one: the text is as long for 1,024 ranks as for 8.
EVENLY = 8


def _evenly(ranks: Sequence[Intervals], at: int) -> tuple[int, tuple[int, ...]]:
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


def _written(held: Intervals, spacings: tuple[int, ...], count: int) -> str:
    if count == 1:
        return ",".join(f"{a}:{b}" for a, b in held)
    moved = zip(held, spacings, strict=True)
    return f"{','.join(f'{a}:{b}{by:+}' for (a, b), by in moved)}*{count}"


def _read(text: str) -> list[list[tuple[int, int]]]:
    """What the ranks hold that ``_written`` wrote."""
    intervals, _, count = text.partition("*")
    found = [re.fullmatch(r"(\d+):(\d+)([+-]\d+)?", part) for part in intervals.split(",") if part]
    numbers = [(int(m[1]), int(m[2]), int(m[3] or 0)) for m in found if m is not None]
    return [[(a + i * by, b + i * by) for a, b, by in numbers] for i in range(int(count or 1))]


class Exchange(NamedTuple):
    """One rank's side of an ``all_to_all_single``, in elements of the axis.

    ``take`` cuts the shard into the send buffer, ``send`` and ``receive`` are the splits, and
    ``place`` puts the receive buffer into the memory order of the new layout.
    """

    take: tuple[Run, ...]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    place: tuple[Run, ...]


def exchange(source: Layout, target: Layout, rank: int) -> Exchange:
    """What ``rank`` sends and receives when an axis changes from one partition to another. A peer's
    pieces travel in the order of the receiver's memory."""
    take: list[Run] = []
    send, receive = [], []
    held = sorted(placed(source.ranks[rank]))
    for wanted in target.ranks:
        runs = [run for interval in wanted for _, run in cut(held, interval)]
        send.append(sum(run.stop - run.start for run in runs))
        take += runs
    arrived, offset = [], 0  # (where it belongs in memory, where it lies in the receive buffer)
    wants = placed(target.ranks[rank])
    for peer in source.ranks:
        theirs, before = sorted(placed(peer)), offset
        for interval, run in wants:
            for piece, _ in cut(theirs, interval):
                belongs = run.start + piece.start - interval.start
                arrived.append((belongs, Run(offset, offset + piece.length)))
                offset += piece.length
        receive.append(offset - before)
    place = joined_runs(run for _, run in sorted(arrived))
    return Exchange(joined_runs(take), tuple(send), tuple(receive), place)


def cut(held: Sequence[tuple[Interval, Run]], wanted: Interval) -> Iterator[tuple[Interval, Run]]:
    """What is wanted of intervals in ascending order, each with its stretch of memory."""
    at = max(bisect_right(held, wanted.start, key=lambda part: part[0].start) - 1, 0)
    for interval, run in islice(held, at, None):
        if interval.start >= wanted.stop:
            return
        piece = _intersect(interval, wanted)
        if piece.length > 0:
            start = run.start + piece.start - interval.start
            yield piece, Run(start, start + piece.length)


@dataclass(frozen=True)
class Place:
    """Where a sharded axis sits in a tensor: dim ``dim`` has size outer x layout.n x inner."""

    layout: Layout
    dim: int
    outer: int = 1
    inner: int = 1
    mesh_axis: str = "sp"

    @property
    def size(self) -> int:
        return self.outer * self.layout.n * self.inner

    def local_size(self, rank: int) -> int:
        return self.outer * self.layout.lengths[rank] * self.inner

    def local_shape(self, shape: Sequence[int], rank: int) -> list[int]:
        return [self.local_size(rank) if d == self.dim else s for d, s in enumerate(shape)]

    def at(self, dim: int) -> Place:
        return replace(self, dim=dim)

    def with_layout(self, layout: Layout) -> Place:
        return replace(self, layout=layout)

    def refined(self) -> Place:
        """Read rows of ``inner`` elements as a longer axis; possible when nothing is outside."""
        if self.outer != 1 or self.inner == 1:
            return self
        return replace(self, layout=self.layout.scale(self.inner), inner=1)

    def coarsened(self) -> Place:
        """Undo ``refined``: the longest rows that no rank's interval tears."""
        k = gcd(self.layout.n, *(bound for r in self.layout.ranks for i in r for bound in i))
        coarse = self.layout.coarsen(k) if k > 1 else None
        return replace(self, layout=coarse, inner=self.inner * k) if coarse else self

    def __str__(self) -> str:
        block = (
            f" outer={self.outer} inner={self.inner}" if (self.outer, self.inner) != (1, 1) else ""
        )
        return f"{self.layout} dim={self.dim}{block}"


@dataclass(frozen=True)
class Shard:
    """One rank's side of a place, written into graphs as a string: all that a collective needs."""

    place: Place
    rank: int
    group: str

    def encode(self) -> str:
        p = self.place
        return f"{p.layout} {p.dim} {p.outer} {p.inner} {p.mesh_axis} {self.rank} {self.group}"

    @classmethod
    def decode(cls, text: str) -> Shard:
        layout, dim, outer, inner, mesh_axis, rank, group = text.split(" ")
        place = Place(Layout.parse(layout), int(dim), int(outer), int(inner), mesh_axis)
        return cls(place, int(rank), group)


def held_rows_of(shard: Shard) -> list[tuple[int, int, int]]:
    """(start, stop, where it begins in this rank's memory) of every interval of the whole dim."""
    place = shard.place
    held = place.layout.blocks(place.outer, place.inner).ranks[shard.rank]
    return [(*interval, run.start) for interval, run in placed(held)]
