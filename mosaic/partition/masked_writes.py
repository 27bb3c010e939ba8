"""Writes by a mask: where it is true stand the rows of the new values, in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.api.errors import MosaicError
from mosaic.graph.source import innermost, where
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten


def put(s: ShardingInterpreter, c: Call, indices: list[Value | None]) -> Value:
    """``x[mask] = values``: a row for each element of the mask that is true, in turn, or one for
    all of them."""
    before, mask = next((d, i) for d, i in enumerate(indices) if i is not None)
    x, behind = c.x, c.x.ndim - before - mask.ndim
    rows = s.call(c, aten.reshape.default, c["values"], lifted(c["values"], before + 1 + behind))
    count = rows.shape[before]
    if count != 1:
        mask = counted(s, c, mask, count)
    if count == 0:
        mask = s.call(c, aten.reshape.default, mask, [*mask.shape, *[1] * behind])
        return s.call(c, aten.masked_fill.Scalar, x, mask, 0)  # nothing is true
    if count > 1:
        flat = s.call(c, aten.reshape.default, mask, [-1])
        number = s.call(c, aten.sub.Tensor, s.call(c, aten.cumsum.default, flat, 0), 1)
        number = s.call(c, aten.clamp.default, number, 0)  # of those in front of the first
        rows = s.call(c, aten.index_select.default, rows, before, number)
    there = [*mask.shape] if count > 1 else [1] * mask.ndim
    shape = [*rows.shape[:before], *there, *rows.shape[before + 1 :]]
    rows = s.call(c, aten.reshape.default, rows, shape)
    mask = s.call(c, aten.reshape.default, mask, [*mask.shape, *[1] * behind])
    if c["accumulate"]:
        rows = s.call(c, aten.add.Tensor, x, rows)
    return s.call(c, aten.where.self, mask, rows, x)


def lifted(x: Value, ndim: int) -> list[int]:
    """x's shape with ones in front, as broadcasting has it."""
    return [*[1] * (ndim - x.ndim), *x.shape]


def counted(s: ShardingInterpreter, c: Call, mask: Value, count: int) -> Value:
    """The mask, which is true as often as there are rows; else that is an error on all ranks."""
    total = s.call(c, aten.sum.default, mask)
    line = where(c.like) if innermost(c.like) else ""  # without a compiler the traceback has it
    return s.call(c, torch.ops.mosaic.counted_mask.default, mask, total, count, line)


TAGS = (torch.Tag.cudagraph_unsafe,)  # torch 2.11 takes no tag by itself


@torch.library.custom_op("mosaic::counted_mask", mutates_args=(), tags=TAGS)
def counted_mask(mask: Tensor, total: Tensor, count: int, line: str) -> Tensor:
    """Waits for the number of trues, as PyTorch's own write by a mask does."""
    if int(total) != count:
        raise MosaicError(
            f"a write by a mask has {count} rows for {int(total)} elements that are true",
            where=line,
            fix="give one row for each of them, or one row for all",
        )
    return mask.clone()


@counted_mask.register_fake
def _(mask: Tensor, total: Tensor, count: int, line: str) -> Tensor:
    return torch.empty_like(mask)
