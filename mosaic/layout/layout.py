"""Who holds which indices of an axis."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import accumulate, pairwise, product

from mosaic.api.errors import ShardingError
from mosaic.layout.intervals import (
    Interval,
    Intervals,
    Run,
    common,
    cut,
    joined,
    joined_runs,
    placed,
)
from mosaic.layout.text import EVENLY, evenly, read, written


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
            return cls(n, tuple(joined(r) for r in ranks))
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
    def zigzags(cls, n: int, p: int, chunk: int = 128, most: int = 32) -> Layout:
        """Balance of documents, wherever they begin: as many zigzags, one after the other, as have
        chunks no shorter than ``chunk``, at ``most`` so many.

        >>> print(Layout.zigzags(16, 2, chunk=2))
        16=0:2,6:10,14:16|2:6,10:14
        """
        _check_sizes(n, p)
        times = max(1, min(most, n // (2 * p * chunk)))
        chunks = [c[0] if c else (0, 0) for c in cls.even(n, 2 * p * times).ranks]
        some = [chunks[start : start + 2 * p] for start in range(0, len(chunks), 2 * p)]
        return cls.of(n, ([x for z in some for x in (z[r], z[-1 - r])] for r in range(p)))

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
        return cls.crossed([rows.blocks(1, cols.n), cols.blocks(rows.n, 1)], ranks)

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Layout:
        """Read what ``str`` wrote."""
        n, ranks = text.split("=")
        return cls.of(int(n), (held for part in ranks.split("|") for held in read(part)))

    def __str__(self) -> str:
        """``16=0:2,14:16|2:4,12:14|4:6,10:12|6:10``. Eight and more neighbouring ranks whose
        intervals are evenly spaced are written as one, with the spacings and their number.

        >>> print(Layout.zigzag(4096, 1024))
        4096=0:2+2,4094:4096-2*1023|2046:2050
        """
        parts, at = [], 0
        while at < self.p:
            count, spacings = evenly(self.ranks, at)
            count = count if count >= EVENLY else 1
            parts.append(written(self.ranks[at], spacings, count))
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
    def crossed(cls, axes: Sequence[Layout], ranks: Iterable[tuple[int, ...]]) -> Layout:
        """Several axes of one dim: rank (i, j) holds what rank i of the first and rank j of the
        second both hold.

        >>> rows, columns = Layout.even(2, 2).blocks(1, 3), Layout.even(3, 2).blocks(2, 1)
        >>> print(Layout.crossed([rows, columns], product((0, 1), (0, 1))))
        6=0:2|2:3|3:5|5:6
        """
        held = ([a.ranks[i] for a, i in zip(axes, place, strict=True)] for place in ranks)
        return cls(axes[0].n, tuple(reduce(common, each) for each in held))

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
