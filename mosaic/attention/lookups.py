"""A table looked up at every pair of a tile, with a gradient for which pairs do not queue.

T5's table has 32 entries for the millions of pairs of a tile. On a GPU all pairs of an entry are
added to one number, one after the other. So in backward each key has a copy of the table to add to:
``T5 bias, 16 heads, 8,192 tokens`` of ``tests/gpu/check_mask_rates.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The most numbers that copies of a table have.
MOST = 2**22


class Lookup(torch.autograd.Function):
    """table (entries, heads|1) at index (batch|1, heads|1, s|1, t|1): (batch|1, heads|1, s|1, t|1).
    The entry ``padding`` gets no gradient, as in ``embedding``."""

    @staticmethod
    def forward(table: Tensor, index: Tensor, padding: int) -> Tensor:
        if table.shape[1] == 1:
            return torch.ops.aten.index.Tensor(table, [index]).squeeze(4)
        rows = torch.ops.aten.index.Tensor(table.mT.contiguous(), [None, index])
        return rows.squeeze(2).movedim(0, 1)  # keys side by side, as a kernel wants them

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        table, index, ctx.padding = inputs
        ctx.shape = table.shape
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return table_gradient(dfound, index, ctx.shape, ctx.padding), None, None


def table_gradient(dfound: Tensor, index: Tensor, shape: torch.Size, padding: int) -> Tensor:
    entries, heads = shape
    copies = max(1, min(index.shape[3], MOST // max(1, entries * heads)))
    copy = torch.arange(index.shape[3], device=index.device) % copies
    places = (index.remainder(entries) * copies + copy).reshape(1, -1)
    parts = dfound.movedim(1, 0).reshape(heads, -1) if heads > 1 else dfound.reshape(1, -1)
    blank = dfound.new_zeros([heads, entries * copies])
    total = blank.scatter_add(1, places.expand(heads, -1), parts)
    total = total.unflatten(1, (entries, copies)).sum(2).mT
    if padding < 0:
        return total
    keep = torch.arange(entries, device=index.device) != padding
    return total * keep[:, None]
