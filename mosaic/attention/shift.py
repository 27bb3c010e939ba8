"""The largest bias that each row sees, to be taken off all of its scores.

A row that sees nothing but ``finfo.min`` (in the way of transformers) has equal weights on one
device. Its log-sum-exp, finfo.min + log(n), would round the number of keys away, and blocks of
unequal length could not be merged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.blocks import FULL, Band
from mosaic.layout import Intervals


def row_shift(mask: Tensor, band: Band, rows: Intervals) -> Tensor | None:
    """(batch|1, heads|1, seq|1, 1) of a float mask (batch|1, heads|1, seq|1, keys|1), whose rows
    are the queries at ``rows``; 0 where there is nothing to take off."""
    if not mask.numel():
        return None
    mask = mask.detach()
    if band == FULL or mask.shape[3] == 1:
        largest = mask.amax(-1, keepdim=True)
    elif mask.shape[2] == 1:
        largest = _largest_in_band(mask, band, rows)[..., _positions(rows, mask), :]
    else:
        largest = mask.masked_fill(_hidden(mask, band, rows), float("-inf")).amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def _positions(rows: Intervals, like: Tensor) -> Tensor:
    parts = [torch.arange(a, b, device=like.device) for a, b in rows]
    return torch.cat([*parts, torch.arange(0, device=like.device)])


def _hidden(mask: Tensor, band: Band, rows: Intervals) -> Tensor:
    ahead = torch.arange(mask.shape[3], device=mask.device) - _positions(rows, mask)[:, None]
    right = torch.zeros_like(ahead, dtype=torch.bool) if band.right is None else ahead > band.right
    return right if band.left is None else right | (ahead < -band.left)


def _largest_in_band(mask: Tensor, band: Band, rows: Intervals) -> Tensor:
    """(..., 1, keys) -> (..., positions, 1): for each position i of a query the largest from i -
    left to i + right, in stretches of 1, 2, 4 ... keys."""
    keys, count = mask.shape[3], max((stop for _, stop in rows), default=0)
    left = max(count - 1, 0) if band.left is None else band.left
    right = keys - 1 if band.right is None else band.right
    length, size = left + right + 1, 1
    if length < 1:
        return mask.new_full([*mask.shape[:2], count, 1], float("-inf"))
    front, behind = max(left, 0), max(count + right - keys, 0)
    found = F.pad(mask, (front, behind), value=float("-inf"))
    found = found.narrow(3, front - left, count + length - 1)
    while size < length:
        further = min(size, length - size)
        found = torch.maximum(found[..., :-further], found[..., further:])
        size += further
    return found.mT
