"""Laws of the cuts of a block of attention: against a dense mask, for any intervals and band."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic.attention.blocks import (
    CAUSAL,
    FULL,
    Band,
    Piece,
    pieces,
    reach,
    row_blocks,
    simple,
    stretch,
)
from mosaic.layout import Interval, Layout, common

bounds = st.none() | st.integers(-3, 14)
bands = st.sampled_from([FULL, CAUSAL]) | st.builds(Band, bounds, bounds)


@st.composite
def intervals(draw: st.DrawFn, n: int = 14) -> tuple[Interval, ...]:
    """Up to three intervals in any order."""
    cuts = sorted(draw(st.sets(st.integers(0, n), max_size=6)))
    found = [Interval(*pair) for pair in list(pairwise(cuts))[::2]]
    return tuple(draw(st.permutations(found)))


@given(intervals(), st.integers(0, 14), st.integers(0, 14))
def test_a_stretch_of_memory(held: tuple[Interval, ...], start: int, stop: int) -> None:
    def indices(intervals: tuple[Interval, ...]) -> list[int]:
        return [i for interval in intervals for i in range(*interval)]

    assert indices(stretch(held, start, stop)) == indices(held)[start:stop]


def sees(piece: Piece, i: int, j: int) -> bool:
    low = piece.lower is None or piece.lower <= j - i
    return low and (piece.upper is None or j - i <= piece.upper)


def dense(found: tuple[Piece, ...], s: int, t: int) -> list[list[int]]:
    """How often each (row, key) is seen."""
    seen = [[0] * t for _ in range(s)]
    for piece in found:
        for i in range(piece.rows):
            for j in range(piece.keys):
                seen[piece.q_start + i][piece.k_start + j] += sees(piece, i, j)
    return seen


def indices(held: tuple[Interval, ...]) -> list[int]:
    return [i for a, b in held for i in range(a, b)]


def in_band(band: Band, i: int, j: int) -> bool:
    left = band.left is None or i - band.left <= j
    return left and (band.right is None or j <= i + band.right)


@given(intervals(), intervals(), bands)
def test_pieces_see_exactly_the_band(queries, keys, band: Band) -> None:
    rows, columns = indices(queries), indices(keys)
    want = [[int(in_band(band, i, j)) for j in columns] for i in rows]
    found = pieces(queries, keys, band)
    assert dense(found, len(rows), len(columns)) == want
    for piece in found:
        check_tight(piece)
    assert len(found) <= 1 or band != FULL


def check_tight(piece: Piece) -> None:
    """No row or key is idle, and each bound cuts something off."""
    seen = [[sees(piece, i, j) for j in range(piece.keys)] for i in range(piece.rows)]
    assert all(any(row) for row in seen) and all(any(column) for column in zip(*seen, strict=True))
    assert piece.is_tight and sum(map(sum, seen)) == piece.area
    for bound in ("lower", "upper"):
        if getattr(piece, bound) is not None:
            assert piece._replace(**{bound: None}).area > piece.area


@given(intervals(), intervals(), bands)
def test_smaller_pieces_see_the_same(queries, keys, band: Band) -> None:
    s, t = len(indices(queries)), len(indices(keys))
    for piece in pieces(queries, keys, band):
        want = dense((piece,), s, t)
        blocks = row_blocks(piece, 3)
        assert dense(blocks, s, t) == want and len(blocks) <= 3
        if piece.lower is None:
            assert dense(simple(piece), s, t) == want
            assert all(part.causal or part.band == (None, None) for part in simple(piece))


@given(intervals(), intervals(), bands)
def test_visible_keys_are_those_that_a_query_sees(queries, keys, band: Band) -> None:
    rows = indices(queries)
    want = [j for j in indices(keys) if any(in_band(band, i, j) for i in rows)]
    assert indices(common(keys, reach(queries, band, 14))) == want


@given(st.integers(1, 6), st.integers(1, 6), bounds, bounds)
def test_tight_is_said_of_pieces_where_nothing_is_idle(s: int, t: int, lower, upper) -> None:
    piece = Piece(0, s, 0, t, lower, upper)
    (seen,) = [dense((piece,), s, t)]
    idle = not all(map(any, seen)) or not all(map(any, zip(*seen, strict=True)))
    assert piece.is_tight == (not idle)


@pytest.mark.parametrize("owner", range(4))
def test_zigzag_is_one_piece_per_owner(owner: int) -> None:
    layout = Layout.zigzag(32, 4)
    (piece,) = pieces(layout.ranks[2], layout.ranks[owner], CAUSAL)
    want = {
        2: Piece(0, 8, 0, 8, upper=0),  # itself: a triangle of the local concatenation
        3: Piece(4, 8, 0, 8),  # later: the second half of the queries
    }
    assert piece == want.get(owner, Piece(0, 8, 0, 4))  # earlier: the first half of the keys
    assert piece.causal == (owner == 2)


def test_gathered_keys_need_one_piece_per_query_interval() -> None:
    found = pieces([(4, 8), (24, 28)], [(0, 32)], CAUSAL)
    assert found == (Piece(0, 4, 0, 8, upper=4), Piece(4, 8, 0, 28, upper=24))
    assert [len(simple(piece)) for piece in found] == [2, 2]


def test_a_window_reaches_into_the_chunk_before() -> None:
    window = Band(3, 0)
    assert common((Interval(0, 8),), reach((Interval(8, 16),), window, 16)) == (Interval(5, 8),)
    assert pieces([(8, 16)], [(0, 8)], window) == (Piece(0, 3, 5, 8, lower=0),)
    assert pieces([(8, 16)], [(5, 16)], window) == (Piece(0, 8, 0, 11, lower=0, upper=3),)


def test_a_narrow_band_is_computed_in_blocks_of_rows() -> None:
    (piece,) = pieces([(0, 800)], [(0, 800)], Band(99, 0))
    blocks = row_blocks(piece)
    assert len(blocks) == 8
    assert sum(block.rows * block.keys for block in blocks) < 800 * 800 / 4
