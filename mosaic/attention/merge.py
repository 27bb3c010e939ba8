"""Joining partial attentions over disjoint keys by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

#: An attention over some keys: ``out`` (batch, heads, seq, head_dim), ``lse`` (batch, heads, seq).
Partial = tuple[Tensor, Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What partial results are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite(lse: Tensor) -> Tensor:
    """0 for a row that saw no key: then exp(score - lse) is exp(-inf) = 0, and never NaN."""
    return torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over all the parts' keys, in float32 or float64.

    With a max, never with ``logsigmoid``, which is NaN where two parts saw no key.
    """
    out, lse = parts[0]
    if len(parts) == 1:
        return out.to(accumulator(out.dtype)), lse
    largest = finite(reduce(torch.maximum, (lse for _, lse in parts)))
    weights = [torch.exp(lse - largest) for _, lse in parts]
    total = reduce(torch.add, weights)
    divisor = torch.where(total == 0, torch.ones_like(total), total)
    outs = (
        out.to(lse.dtype) * (weight / divisor).unsqueeze(-1)
        for (out, lse), weight in zip(parts, weights, strict=True)
    )
    return reduce(torch.add, outs), largest + torch.log(total)


def merge_stacked(out: Tensor, lse: Tensor) -> Partial:
    """``merge`` of out (batch, heads, parts, seq, head_dim), lse (batch, heads, parts, seq)."""
    largest = finite(lse.amax(2))
    weight = torch.exp(lse - largest.unsqueeze(2))
    total = weight.sum(2)
    divisor = torch.where(total == 0, torch.ones_like(total), total)
    share = (weight / divisor.unsqueeze(2)).unsqueeze(-1)
    return (out.to(lse.dtype) * share).sum(2), largest + torch.log(total)


def unwritten(q: Tensor, v: Tensor) -> Partial:
    """out and lse of a kernel that has not run: for tracing."""
    out = q.new_empty([*q.shape[:3], v.shape[3]])
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def nothing(q: Tensor, v: Tensor) -> Partial:
    """The attention over no keys: out 0, lse -inf."""
    dtype = accumulator(q.dtype)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    return q.new_zeros([*q.shape[:3], v.shape[3]], dtype=dtype), lse
