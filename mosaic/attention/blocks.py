"""Which parts of a block of attention are seen: pure Python, no torch.

A causal block of any two layouts is cut into rectangles where everything is seen and aligned
triangles: what kernels can do without a mask tensor.

>>> for piece in pieces([(4, 8)], [(0, 8)], causal=True):
...     print(piece)
Piece(q_start=0, q_stop=4, k_start=4, k_stop=8, causal=True)
Piece(q_start=0, q_stop=4, k_start=0, k_stop=4, causal=False)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, permutations, product
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows [q_start, q_stop) see keys [k_start, k_stop), in local memory: all, or the triangle."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False

    @property
    def is_empty(self) -> bool:
        return self.q_start >= self.q_stop or self.k_start >= self.k_stop


def pieces(
    queries: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]], causal: bool
) -> tuple[Piece, ...]:
    """The cuts for the queries and keys at these global intervals, in the order of their memory."""
    if not causal:
        whole = Piece(0, sum(b - a for a, b in queries), 0, sum(d - c for c, d in keys))
        return () if whole.is_empty else (whole,)
    cuts = [
        piece
        for q, k in product(_placed(queries), _placed(keys))
        for piece in _cut(*q, *k)
        if not piece.is_empty
    ]
    return tuple(_joined(_joined(cuts, _join_triangles), _join_rectangles))


def _placed(intervals: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """(start, stop, what must be added to a global index to get the local one)."""
    offsets = accumulate((b - a for a, b in intervals), initial=0)
    return [(a, b, offset - a) for (a, b), offset in zip(intervals, offsets, strict=False)]


def _cut(a: int, b: int, q_shift: int, c: int, d: int, k_shift: int) -> list[Piece]:
    """Queries [a, b) and keys [c, d): rows before c see nothing, rows from d on see everything."""
    first, last = max(a, c), min(b, d)
    below = max(a, d)
    rows = (first + q_shift, last + q_shift)
    return [
        Piece(*rows, first + k_shift, last + k_shift, True),
        Piece(*rows, c + k_shift, first + k_shift),
        Piece(below + q_shift, b + q_shift, c + k_shift, d + k_shift),
    ]


def _joined(found: list[Piece], join) -> list[Piece]:
    """Apply ``join`` until it finds nothing more."""
    while (smaller := join(found)) is not None:
        found = smaller
    return found


def _join_triangles(found: list[Piece]) -> list[Piece] | None:
    """Two triangles and the square below the first are one triangle (zigzag with itself)."""
    triangles = [piece for piece in found if piece.causal]
    for a, b in permutations(triangles, 2):
        square = Piece(b.q_start, b.q_stop, a.k_start, a.k_stop)
        if (a.q_stop, a.k_stop) == (b.q_start, b.k_start) and square in found:
            joined = Piece(a.q_start, b.q_stop, a.k_start, b.k_stop, True)
            return [joined, *(piece for piece in found if piece not in (a, b, square))]
    return None


def _join_rectangles(found: list[Piece]) -> list[Piece] | None:
    """Two rectangles side by side, or one above the other, are one."""
    rectangles = [piece for piece in found if not piece.causal]
    for a, b in permutations(rectangles, 2):
        beside = a[:2] == b[:2] and a.k_stop == b.k_start
        above = a[2:4] == b[2:4] and a.q_stop == b.q_start
        if beside or above:
            joined = Piece(a.q_start, b.q_stop, a.k_start, b.k_stop)
            return [*(piece for piece in found if piece not in (a, b)), joined]
    return None
