"""Attention by plain matrix products, in float32 or float64: right for every block whose mask is a
tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.kernels.kernel import Bounds, Case, Gradients, Kernel
from mosaic.attention.merge import Partial, accumulator, finite, nothing


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, s, x) -> (batch, kv_heads, group * s, x): a group shares its keys."""
    batch, _, s, x = q.shape
    return q.reshape(batch, k.shape[1], q.shape[1] // k.shape[1] * s, x)


def _scores(
    q: Tensor,
    k: Tensor,
    band: Bounds,
    mask: Tensor | None,
    scale: float,
    shift: Tensor | None,
) -> Tensor:
    """(batch, heads, s, t) in float32 or float64, -inf where a key is not seen."""
    dtype = accumulator(q.dtype)
    scores = (_grouped(q, k).to(dtype) @ k.to(dtype).mT) * scale
    scores = scores.reshape(*q.shape[:3], k.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
        scores = scores if shift is None else scores - shift.to(dtype)
    if band == (None, None):
        return scores
    return scores.masked_fill(outside(band, q.shape[2], k.shape[2], q.device), float("-inf"))


def outside(band: Bounds, s: int, t: int, device: torch.device) -> Tensor:
    """(s, t), True where row i does not see key j."""
    lower = -s if band[0] is None else band[0]
    upper = t if band[1] is None else band[1]
    row, column = (torch.arange(n, device=device) for n in (s, t))
    ahead = column[None, :] - row[:, None]
    return (ahead < lower) | (ahead > upper)


def _forward(q, k, v, *, band, mask, scale, keep, shift) -> Partial:
    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, v)
    scores = _scores(q, k, band, mask, scale, shift)
    largest = finite(scores.amax(-1))
    weights = torch.exp(scores - largest.unsqueeze(-1))
    total = weights.sum(-1)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    if keep is not None:
        weights = weights * keep
    out = _grouped(weights, k) @ v.to(weights.dtype)
    return out.reshape(*q.shape[:3], v.shape[3]), largest + torch.log(total)


def _backward(dout, q, k, v, out, lse, *, band, mask, scale, keep, shift, need_dmask) -> Gradients:
    dtype = accumulator(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        dmask = torch.zeros_like(mask, dtype=dtype) if need_dmask else None
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        return dq, dk, dv, dmask
    dout, shape = dout.to(dtype), (*q.shape[:3], k.shape[2])
    weights = torch.exp(_scores(q, k, band, mask, scale, shift) - finite(lse).unsqueeze(-1))
    dropped = weights if keep is None else weights * keep
    dv = _grouped(dropped, k).mT @ _grouped(dout, k)
    dweights = (_grouped(dout, k) @ v.to(dtype).mT).reshape(shape)
    if keep is not None:
        dweights = dweights * keep
    dscores = weights * (dweights - (dout * out.to(dtype)).sum(-1, keepdim=True))
    dq = (_grouped(dscores, k) @ k.to(dtype)).reshape(q.shape) * scale
    dk = _grouped(dscores, k).mT @ _grouped(q, k).to(dtype) * scale
    return dq, dk, dv, summed_to(dscores, mask.shape) if need_dmask else None


def summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of what was broadcast from ``shape`` to ``x``."""
    dims = [d for d in range(x.dim()) if shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def _fits(case: Case) -> bool:
    return not case.is_structured


MATH = Kernel("math", _fits, "tile", _forward, _backward)
