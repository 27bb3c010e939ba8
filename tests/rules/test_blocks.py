"""Laws of the cuts of a causal block: against a dense mask, for any intervals."""

from __future__ import annotations

import random

import pytest

from mosaic.attention.blocks import Piece, pieces
from mosaic.layout import Layout


def dense(found: tuple[Piece, ...], s: int, t: int) -> list[list[int]]:
    """How often each (row, key) is seen."""
    seen = [[0] * t for _ in range(s)]
    for piece in found:
        for i in range(piece.q_start, piece.q_stop):
            for j in range(piece.k_start, piece.k_stop):
                seen[i][j] += not piece.causal or i - piece.q_start >= j - piece.k_start
    return seen


def some_intervals(rng: random.Random, n: int) -> list[tuple[int, int]]:
    cuts = sorted(rng.sample(range(n + 1), rng.choice([0, 2, 4, 6])))
    intervals = list(zip(cuts[::2], cuts[1::2], strict=True))
    rng.shuffle(intervals)
    return intervals


@pytest.mark.parametrize("causal", [False, True])
def test_pieces_see_exactly_the_mask(causal: bool) -> None:
    for seed in range(300):
        check(random.Random(seed), causal)


def check(rng: random.Random, causal: bool) -> None:
    queries, keys = some_intervals(rng, 13), some_intervals(rng, 13)
    rows = [i for a, b in queries for i in range(a, b)]
    columns = [j for a, b in keys for j in range(a, b)]
    want = [[int(not causal or j <= i) for j in columns] for i in rows]
    found = pieces(queries, keys, causal)
    assert dense(found, len(rows), len(columns)) == want
    assert not any(piece.is_empty for piece in found)
    triangles = [piece for piece in found if piece.causal]
    assert all(p.q_stop - p.q_start == p.k_stop - p.k_start for p in triangles)


@pytest.mark.parametrize("owner", range(4))
def test_zigzag_is_one_piece_per_owner(owner: int) -> None:
    layout = Layout.zigzag(32, 4)
    (piece,) = pieces(layout.ranks[2], layout.ranks[owner], causal=True)
    want = {
        2: Piece(0, 8, 0, 8, True),  # itself: a triangle of the local concatenation
        3: Piece(4, 8, 0, 8),  # later: the second half of the queries
    }
    assert piece == want.get(owner, Piece(0, 8, 0, 4))  # earlier: the first half of the keys


def test_gathered_keys_need_two_pieces_per_query_interval() -> None:
    assert len(pieces([(4, 8), (24, 28)], [(0, 32)], causal=True)) == 4
