"""The largest bias that each row sees, to be taken off all of its scores.

A row that sees nothing but ``finfo.min`` (in the way of transformers) has equal weights on one
device. Its log-sum-exp, finfo.min + log(n), would round the number of keys away, and blocks of
unequal length could not be merged. (Beside a sink such a row weighs nothing.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.attend import Rows, by_rows
from mosaic.attention.blocks import FULL, Band, Piece
from mosaic.attention.kernels.math import outside
from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.scores import then, with_bias
from mosaic.attention.structure import positions
from mosaic.attention.tiles import TileProgram
from mosaic.attention.visit import Inputs, Visit, is_in_kernel, key_blocks, visit
from mosaic.layout import Interval, Intervals


def shift_of(
    plan: AttentionPlan,
    rows: Intervals,
    q: Tensor,
    held: tuple[Tensor, Tensor],
    inputs: Inputs,
) -> Tensor | None:
    """(batch|1, heads|1, seq|1, 1) for q (batch, heads, seq, head_dim), the queries at ``rows``; 0
    where there is nothing to take off, None where no bias is added, or one that is ``mild`` by a
    kernel, or a sink is seen. ``held``: keys and values like those that visit."""
    mask = inputs.mask
    if inputs.sinks is not None:
        return None
    if not plan.has_bias and (mask is None or mask.dtype == torch.bool):
        return None
    if mask is not None and inputs.query_documents is None:
        return row_shift(mask, plan.band, rows)
    if mask is None and is_in_kernel(plan, q, *held):
        is_mild = TileProgram.parse(plan.tile).mild
        return None if is_mild else by_kernel(plan, rows, q, inputs)
    dtype = TileProgram.parse(plan.tile).dtype if mask is None else mask.dtype
    unseen = q.new_full([*q.shape[:3], 1], float("-inf"), dtype=dtype)
    found: list[Rows] = [(0, q.shape[2], (unseen,))]
    for _, keys in key_blocks(plan, (Interval(0, plan.key.n),), bool(plan.tile)):
        here = visit(plan, rows, keys, q, inputs)
        found += [(x.q_start, x.q_stop, (_largest(here, x),)) for x in here.pieces]
    (largest,) = by_rows(found, lambda parts: (reduce(torch.maximum, (x for (x,) in parts)),))
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def by_kernel(plan: AttentionPlan, rows: Intervals, q: Tensor, inputs: Inputs) -> Tensor | None:
    """(batch|1, heads|1, seq, 1), about as much, without any tile: the log-sum-exp of biases alone,
    which is within log(keys) of the largest.

    Of their halves: kernels take powers of 2, and finfo.min times log2(e) would be -inf. And once
    more of what is left, which a float holds exactly: of a low number the last digit counts.
    """
    here = visit(plan, rows, (Interval(0, plan.key.n),), q, inputs)
    if here.is_empty or here.bias is None:
        return None
    leaves = [*here.bias.leaves, *(here.seen.leaves if here.seen else ())]
    lead = [max(leaf.shape[d] for leaf in leaves if leaf.ndim == 4) for d in (0, 1)]
    lead[1] = max([lead[1], *(leaf.shape[1] for leaf in leaves if leaf.ndim == 2)])
    queries, keys = (q.new_zeros([*lead, n, 16]) for n in (q.shape[2], plan.key.n))
    shift = q.new_zeros([*lead, q.shape[2], 1], dtype=accumulator(q.dtype))
    for _ in range(2):
        left = then(with_bias(None, here.bias), "sub.Tensor", shift)
        halves = replace(here, bias=None, scores=then(left, "mul.Tensor", 0.5))
        _, options = halves.at_once(queries, keys)
        _, lse = kernels.forward(queries, keys, keys, **options)
        shift = shift + torch.where(lse.isfinite(), 2 * lse, 0).unsqueeze(-1)
        shift = shift.clamp(min=torch.finfo(shift.dtype).min)
    return shift


def _largest(here: Visit, piece: Piece) -> Tensor:
    """(batch|1, heads|1, rows|1, 1): the largest bias that a piece's rows see."""
    mask = here.mask_of(piece)
    assert mask is not None
    mask = mask.detach()
    if piece.band != (None, None):
        hidden = outside(piece.band, piece.rows, piece.keys, mask.device)
        mask = mask.masked_fill(hidden, float("-inf"))
    largest = mask.amax(-1, keepdim=True)
    return largest.expand(-1, -1, piece.rows, -1)


def row_shift(mask: Tensor, band: Band, rows: Intervals) -> Tensor | None:
    """(batch|1, heads|1, seq|1, 1) of a float mask (batch|1, heads|1, seq|1, keys|1), whose rows
    are the queries at ``rows``; 0 where there is nothing to take off."""
    if not mask.numel():
        return None
    mask = mask.detach()
    if band == FULL or mask.shape[3] == 1:
        largest = mask.amax(-1, keepdim=True)
    elif mask.shape[2] == 1:
        largest = _largest_in_band(mask, band, rows)[..., positions(rows, mask.device), :]
    else:
        largest = mask.masked_fill(_hidden(mask, band, rows), float("-inf")).amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def _hidden(mask: Tensor, band: Band, rows: Intervals) -> Tensor:
    ahead = torch.arange(mask.shape[3], device=mask.device) - positions(rows, mask.device)[:, None]
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
