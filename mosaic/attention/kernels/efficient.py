"""ATen's memory-efficient kernel: masks, biases and float32 on CUDA.

It adds a bias to the scores and knows no boolean mask, no window and no grouped heads: these are
written into the bias, and keys and values are repeated. A key that is not seen has a bias that is
very negative but finite: then a row that sees no key has a very negative log-sum-exp, not a NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.kernels.kernel import (
    MOST_BATCHES,
    Bounds,
    Case,
    Gradients,
    Kernel,
    multiple_of_8,
    narrowed,
    seq_first,
    whole_lse,
    widened,
)
from mosaic.attention.kernels.math import outside, summed_to
from mosaic.attention.merge import Partial, accumulator

aten = torch.ops.aten


def _unseen(dtype: torch.dtype) -> float:
    """The bias of a key that is not seen; the kernel multiplies it by log2(e) in float32."""
    return -60000.0 if dtype == torch.float16 else -1e30


class _Shift(NamedTuple):
    """What to do about a row's shift, (batch|1, heads|1, s|1, 1) each.

    The bias has q's dtype, so only a shift that is too large for the log-sum-exp is taken off it.
    ``swallowed`` rows have biases so large that in float32 nothing is left of their scores.
    """

    in_bias: Tensor
    in_lse: Tensor
    swallowed: Tensor

    @classmethod
    def of(cls, shift: Tensor | None) -> _Shift | None:
        if shift is None:
            return None
        shift, nothing = shift.float(), torch.zeros_like(shift, dtype=torch.float32)
        large = shift.abs() > 1e4
        parts = torch.where(large, shift, nothing), torch.where(large, nothing, shift)
        return cls(*parts, shift.abs() > 1e8)  # float16 has no such number


def _bias(
    q: Tensor, k: Tensor, band: Bounds, mask: Tensor | None, shift: _Shift | None
) -> Tensor | None:
    """(batch, heads, s, t) in q's dtype, as a view of what the mask has; None if all is seen."""
    unseen = _unseen(q.dtype)
    s, t = q.shape[2], k.shape[2]
    bias = q.new_zeros([1, 1, 1, 1])
    if mask is not None and mask.dtype == torch.bool:
        bias = bias.masked_fill(~mask, unseen)
    elif mask is not None:
        bias = mask if shift is None else (mask.float() - shift.in_bias).to(q.dtype)
        bias = bias.clamp(min=unseen)
    if band not in ((None, None), (None, 0)):
        bias = bias.masked_fill(outside(band, s, t, q.device), unseen)
    elif mask is None:
        return None
    # rows must start at addresses that are multiples of 16 bytes
    bias = F.pad(bias.expand(*bias.shape[:3], t), (0, -t % 8)).contiguous()[..., :t]
    return bias.expand(*q.shape[:2], s, t)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, t, dim) -> (batch, heads, t, dim)."""
    batch, kv_heads, t, dim = x.shape
    if kv_heads == heads:
        return x
    shape = (batch, kv_heads, heads // kv_heads, t, dim)
    return x.unsqueeze(2).expand(shape).reshape(batch, heads, t, dim)


def _added_up(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x of that of ``_repeated(x)``."""
    if grad.shape[1] == x.shape[1]:
        return grad
    groups = grad.unflatten(1, (x.shape[1], grad.shape[1] // x.shape[1]))
    return groups.to(accumulator(grad.dtype)).sum(2)


def _wide(x: Tensor) -> Tensor:
    return widened(x, multiple_of_8(x.shape[-1]))


def _forward(q, k, v, *, band, mask, scale, shift, **_) -> Partial:
    shift = _Shift.of(shift)
    bias = _bias(q, k, band, mask, shift)
    queries = q if shift is None else q.masked_fill(shift.swallowed, 0)
    inputs = (_wide(queries), *(_wide(_repeated(x, q.shape[1])) for x in (k, v)))
    op = aten._scaled_dot_product_efficient_attention.default
    out, lse, *_ = op(*inputs, bias, True, 0.0, band == (None, 0), scale=scale)
    out, lse = narrowed(out, v.shape[-1]), whole_lse(lse, q.shape[2])
    if bias is None:
        return out, lse
    sees = lse > _unseen(q.dtype) / 2
    lse = lse if shift is None else lse - shift.in_lse.squeeze(-1)
    return out.masked_fill(~sees.unsqueeze(-1), 0), torch.where(sees, lse, float("-inf"))


def _backward(dout, q, k, v, out, lse, *, mask, shift, band, scale, need_dmask, **_) -> Gradients:
    shift = _Shift.of(shift)
    bias = _bias(q, k, band, mask, shift)
    lse = lse if shift is None else lse + shift.in_lse.squeeze(-1)
    lse = torch.where(lse == float("-inf"), float("inf"), lse)  # weight 0 for a row without keys
    lse = F.pad(lse, (0, -q.shape[2] % 32), value=float("inf"))
    queries, keys = _doubled(q, k, shift)
    # Slices of rows come in; their strides are not heeded by all of the backward.
    inputs = [_wide(queries), *(_wide(_repeated(x, q.shape[1])) for x in (keys, v))]
    dout, *inputs = (x.contiguous() for x in (_wide(dout.to(q.dtype)), *inputs))
    out, lse = seq_first(seq_first(_wide(out.to(q.dtype))).contiguous()), lse.contiguous()
    state = torch.zeros([], dtype=torch.int64, device=q.device)  # of a generator that is not used
    needed = [True, True, True, need_dmask]
    op = aten._scaled_dot_product_efficient_attention_backward.default
    dq, dk, dv, dbias = op(
        dout, *inputs, bias, out, lse, state, state, 0.0, needed, band == (None, 0), scale=scale
    )
    dk, dv = _added_up(narrowed(dk, keys.shape[-1]), k), _added_up(narrowed(dv, v.shape[-1]), v)
    dmask = _dmask(dbias, band, mask) if need_dmask else None
    return Gradients(narrowed(dq, q.shape[-1]), _halved(dk, k), dv, dmask)


def _dmask(dbias: Tensor, band: Bounds, mask: Tensor) -> Tensor:
    if band == (None, 0):  # what a causal kernel skips is never written
        s, t = dbias.shape[2:]
        dbias = dbias.masked_fill(outside(band, s, t, dbias.device), 0)
    return summed_to(dbias.to(accumulator(dbias.dtype)), mask.shape)


#: So little of a query leaves equal weights equal; a power of two changes no digit of a gradient.
_LITTLE = 2.0**-60


def _doubled(q: Tensor, k: Tensor, shift: _Shift | None) -> tuple[Tensor, Tensor]:
    """q and k with twice the head_dim where rows may be swallowed: their scores must be 0, and yet
    their queries are in the gradient of the keys, as on one device."""
    if shift is None or q.dtype == torch.float16:
        return q, k
    little = q.masked_fill(~shift.swallowed, 0) * _LITTLE
    return torch.cat([q.masked_fill(shift.swallowed, 0), little], -1), torch.cat([k, k], -1)


def _halved(dk: Tensor, k: Tensor) -> Tensor:
    """The gradient of k of that of ``_doubled``'s keys."""
    dim = k.shape[-1]
    return dk if dk.shape[-1] == dim else dk[..., :dim] + dk[..., dim:] / _LITTLE


def _fits(case: Case) -> bool:
    known = case.dtype in (torch.float16, torch.bfloat16, torch.float32)
    mask = case.mask in (None, torch.bool, case.dtype)
    able = case.device == "cuda" and case.capability >= 8
    return able and known and mask and not (case.dropout or case.empty or case.scores)


EFFICIENT = Kernel("efficient", _fits, "tile", _forward, _backward, MOST_BATCHES)
