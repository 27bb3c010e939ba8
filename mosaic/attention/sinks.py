"""Sinks: for each head one more key, which all queries see with a learned score, of value 0.

With lse' = logaddexp(lse, sink):

    out' = out * exp(lse - lse')
    dsink = -sum over batches and rows of exp(sink - lse') * (dout . out')

So a sink is added once, to what all keys gave together, and kernels that are given out' and lse' in
backward make the right dq, dk and dv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.merge import Partial, accumulator, finite


def with_sinks(found: Partial, sinks: Tensor) -> Partial:
    """``found`` with sinks (heads) among the keys; out is 0 in a row that saw no other key."""
    out, lse = found
    total = torch.logaddexp(lse, of_rows(sinks, lse))
    return out * torch.exp(lse - finite(total)).unsqueeze(-1), total


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What these rows give to sinks (heads); ``out`` and ``lse`` are those with sinks."""
    wide = accumulator(out.dtype)
    gained = (dout.to(wide) * out.to(wide)).sum(-1)
    weight = torch.exp(of_rows(sinks, lse) - finite(lse))
    return -(weight * gained).sum((0, 2)).to(sinks.dtype)


def of_rows(sinks: Tensor, lse: Tensor) -> Tensor:
    """Sinks (heads) beside lse (batch, heads, seq)."""
    return sinks.to(lse.dtype).view(1, -1, 1)
