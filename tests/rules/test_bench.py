"""What the script for several GPUs decides by itself: which length is tried next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_whole import following


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_longest_length_is_found_to_an_eighth(most: int, first: int) -> None:
    """``most``: the longest that fits, in multiples of 8; two are known."""
    found = {8 * n: n <= most for n in (first, 4 * first)}
    while n := following(found, 8):
        assert n not in found and n % 8 == 0
        found[n] = n <= 8 * most
        assert len(found) < 25
    fits = max((n for n, does in found.items() if does), default=0)
    over = min(n for n, does in found.items() if not does)
    assert fits <= 8 * most < over
    assert over - fits <= max(8, fits / 8)


@pytest.mark.parametrize(
    ("found", "then"),
    [
        ({}, None),  # nothing ran: nothing is known
        ({128: True}, 256),
        ({128: True, 256: True, 512: False}, 384),
        ({128: False}, 64),
        ({128: True, 136: False}, None),
    ],
)
def test_what_is_tried_next(found: dict[int, bool], then: int | None) -> None:
    assert following(found, 8) == then
