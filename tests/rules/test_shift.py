"""The largest bias that a row sees."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic.attention.blocks import Band
from mosaic.attention.shift import row_shift
from mosaic.layout import Interval

SIDES = st.none() | st.integers(-4, 9)


@given(st.integers(1, 9), st.integers(2, 9), SIDES, SIDES, st.booleans(), st.integers(0, 8))
def test_is_the_largest_that_is_seen(n, m, left, right, has_rows, start):
    band = Band(left, right)
    rows = (Interval(min(start, n - 1), n), Interval(0, min(start, n - 1)))
    indices = torch.tensor([i for a, b in rows for i in range(a, b)])
    torch.manual_seed(0)
    whole = torch.randn(1, 2, n if has_rows else 1, m)
    mask = whole[:, :, indices] if has_rows else whole
    ahead = torch.arange(m) - indices[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= ahead > (m if right is None else right)
    hidden |= ahead < -(n if left is None else left)
    want = mask.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
    want = want.where(want.isfinite(), 0)
    got = row_shift(mask, band, rows)
    assert torch.equal(got.expand_as(want), want)
