"""Which parts of a block of attention are seen: pure Python, no torch.

Queries see a band of keys: all of them, those before them, or a window. For any two layouts the
part that is seen is cut into few pieces that are bands themselves, in local memory: what kernels
can do without a mask tensor. A kernel that has no bands gets a piece in smaller ones.

>>> pieces([(4, 8)], [(0, 8)], CAUSAL)
(Piece(q_start=0, q_stop=4, k_start=0, k_stop=8, lower=None, upper=4),)
>>> triangle, left = simple(*_)
>>> triangle
Piece(q_start=0, q_stop=4, k_start=4, k_stop=8, lower=None, upper=0)
>>> left
Piece(q_start=0, q_stop=4, k_start=0, k_stop=4, lower=None, upper=None)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from typing import NamedTuple

from mosaic.layout import Interval, Intervals, placed, united


class Band(NamedTuple):
    """The query at global position i sees the keys i - left ... i + right; None is unbounded."""

    left: int | None
    right: int | None

    def __str__(self) -> str:
        """``causal``, ``causal, window 4096`` (so many keys a query sees), or nothing."""
        if self.left is None:
            return {None: "", 0: "causal"}.get(self.right, f"up to {self.right} ahead")
        if self.right == 0:
            return f"causal, window {self.left + 1}"
        first = f"-{self.left}" if self.left >= 0 else f"+{-self.left}"
        return f"window {first} to {'end' if self.right is None else f'+{self.right}'}"

    @property
    def length(self) -> int | None:
        """How many keys a query sees beside that at its own position; None is all of them."""
        return None if self.left is None or self.right is None else self.left + self.right


FULL = Band(None, None)
CAUSAL = Band(None, 0)


class Piece(NamedTuple):
    """Rows [q_start, q_stop) and keys [k_start, k_stop) of local memory.

    Row q_start + i sees key k_start + j where lower <= j - i <= upper; None is unbounded, and is
    written where a bound would cut nothing off. Every row sees a key, every key is seen.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lower: int | None = None
    upper: int | None = None

    @property
    def rows(self) -> int:
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def band(self) -> tuple[int | None, int | None]:
        return self.lower, self.upper

    @property
    def causal(self) -> bool:
        """Whether it is the triangle that every kernel knows: square, with the whole diagonal."""
        return self.band == (None, 0) and self.rows == self.keys

    @property
    def is_tight(self) -> bool:
        """Whether every row sees a key and every key is seen, as in all that ``pieces`` gives."""
        low, high = self._reach()
        return low <= 0 <= high and low <= self.keys - self.rows <= high

    @property
    def area(self) -> int:
        """How many pairs of a row and a key are seen."""
        low, high = self._reach()
        return _below(self.rows, self.keys, high) - _below(self.rows, self.keys, low - 1)

    def _reach(self) -> tuple[int, int]:
        """The smallest and the largest j - i that is seen."""
        low = 1 - self.rows if self.lower is None else self.lower
        return low, self.keys - 1 if self.upper is None else self.upper


def pieces(
    queries: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]], band: Band
) -> tuple[Piece, ...]:
    """What the queries at these global intervals, in the order of their memory, see of the keys."""
    done: list[Piece] = []
    for q, k in product(_placed(queries), _placed(keys)):
        piece = _seen(q, k, band)
        while piece and (match := _first_union(piece, done)):
            other, piece = match
            done.remove(other)
        done += [piece] if piece else []
    return tuple(done)


def sees_any(queries: Intervals, keys: Intervals, band: Band) -> bool:
    """Whether ``pieces`` has any."""
    return any(_seen(q, k, band) for q, k in product(_placed(queries), _placed(keys)))


def reach(queries: Intervals, band: Band, n: int) -> Intervals:
    """Which of ``n`` keys at least one of the queries sees, in ascending order."""
    left, right = band
    if left is not None and right is not None and left + right < 0:
        return ()
    return united(
        Interval(
            0 if left is None else max(0, start - left),
            n if right is None else min(n, stop + right),
        )
        for start, stop in queries
        if start < stop
    )


def stretch(held: Intervals, start: int, stop: int) -> Intervals:
    """What lies from ``start`` to ``stop`` in the memory of who holds these."""
    found = (
        Interval(a + max(start - run.start, 0), b - max(run.stop - stop, 0))
        for (a, b), run in placed(held)
    )
    return tuple(interval for interval in found if interval.length > 0)


def share_seen(band: Band, queries: int, keys: int) -> float:
    """Of all pairs of a query and a key."""
    seen = sum(piece.area for piece in pieces([(0, queries)], [(0, keys)], band))
    return seen / (queries * keys) if seen else 0.0


def simple(piece: Piece) -> tuple[Piece, ...]:
    """A piece without a lower bound, as rectangles and at most one square triangle."""
    if piece.upper is None or piece.causal:
        return (piece,)
    q_middle = piece.q_start + piece.keys - piece.upper
    k_middle = piece.k_start + piece.upper
    found = [
        Piece(piece.q_start, q_middle, k_middle, piece.k_stop, None, 0),
        Piece(piece.q_start, q_middle, piece.k_start, k_middle),
        Piece(q_middle, piece.q_stop, piece.k_start, piece.k_stop),
    ]
    return tuple(part for part in found if part.rows and part.keys)


def row_blocks(piece: Piece, most: int = 8) -> tuple[Piece, ...]:
    """A piece in at most ``most`` blocks of rows, each with the keys that it sees: what is computed
    grows with the band, not with rows x keys."""
    low, high = piece._reach()
    count = max(1, min(most, -(-piece.rows // (high - low + 1)), piece.rows))
    step = -(-piece.rows // count)
    found = []
    for start in range(0, piece.rows, step):
        stop = min(start + step, piece.rows)
        k_start, k_stop = max(0, start + low), min(piece.keys, stop + high)
        rows = (piece.q_start + start, piece.q_start + stop)
        keys = (piece.k_start + k_start, piece.k_start + k_stop)
        shift = start - k_start
        found.append(_piece(*rows, *keys, low + shift, high + shift))
    return tuple(found)


def _placed(intervals: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """(start, stop, what must be added to a global index to get the local one)."""
    offsets = accumulate((b - a for a, b in intervals), initial=0)
    return [(a, b, offset - a) for (a, b), offset in zip(intervals, offsets, strict=False)]


def _seen(q: tuple[int, int, int], k: tuple[int, int, int], band: Band) -> Piece | None:
    """What queries [a, b) see of keys [c, d), without rows and keys that have nothing to do."""
    (a, b, q_shift), (c, d, k_shift) = q, k
    if a >= b or c >= d:
        return None
    low = c - b if band.left is None else -band.left
    high = d - a if band.right is None else band.right
    a, b = max(a, c - high), min(b, d - low)
    c, d = max(c, a + low), min(d, b + high)
    if low > high or a >= b or c >= d:
        return None
    rows, keys = (a + q_shift, b + q_shift), (c + k_shift, d + k_shift)
    return _piece(*rows, *keys, low - c + a, high - c + a)


def _piece(q_start: int, q_stop: int, k_start: int, k_stop: int, low: int, high: int) -> Piece:
    """low <= j - i <= high, and None where that cuts nothing off."""
    lower = low if low > q_start - q_stop + 1 else None
    upper = high if high < k_stop - k_start - 1 else None
    return Piece(q_start, q_stop, k_start, k_stop, lower, upper)


def _first_union(piece: Piece, others: list[Piece]) -> tuple[Piece, Piece] | None:
    unions = ((other, _union(piece, other)) for other in others)
    return next(((other, union) for other, union in unions if union), None)


def _union(a: Piece, b: Piece) -> Piece | None:
    """Two disjoint pieces as one, if that is a piece: a rectangle of two, the triangle of zigzag
    with itself. The smallest piece that holds both must hold nothing else."""
    q_start, q_stop = min(a.q_start, b.q_start), max(a.q_stop, b.q_stop)
    k_start, k_stop = min(a.k_start, b.k_start), max(a.k_stop, b.k_stop)
    reaches = [
        (reach + x.k_start - x.q_start) - (k_start - q_start)
        for x in (a, b)
        for reach in x._reach()
    ]
    both = _piece(q_start, q_stop, k_start, k_stop, min(reaches), max(reaches))
    return both if both.area == a.area + b.area else None


def _below(rows: int, keys: int, high: int) -> int:
    """How many 0 <= i < rows, 0 <= j < keys have j - i <= high."""

    def sum_up_to(x: int) -> int:
        return x * (x - 1) // 2 if x > 0 else 0

    first, last = high + 1, high + 1 + rows
    over = sum_up_to(last - keys) - sum_up_to(first - keys)
    return sum_up_to(last) - sum_up_to(first) - over
