"""Attention by plain matrix products, in float32 or float64: right for every block whose mask is a
tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.kernels.kernel import Bounds, Case, Gradients, Kernel
from mosaic.attention.merge import Partial, accumulator, finite, nothing
from mosaic.attention.scores import changed, gradients
from mosaic.attention.structure import Structure


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, s, x) -> (batch, kv_heads, group * s, x): a group shares its keys."""
    batch, _, s, x = q.shape
    return q.reshape(batch, k.shape[1], q.shape[1] // k.shape[1] * s, x)


def _scaled(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(batch, heads, s, t) in float32 or float64."""
    dtype = accumulator(q.dtype)
    scores = (_grouped(q, k).to(dtype) @ k.to(dtype).mT) * scale
    return scores.reshape(*q.shape[:3], k.shape[2])


def _masked(
    scores: Tensor,
    band: Bounds,
    mask: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Scores (batch, heads, s, t), -inf where a key is not seen."""
    dtype, (s, t) = scores.dtype, scores.shape[2:]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
        scores = scores if shift is None else scores - shift.to(dtype)
    if band == (None, None):
        return scores
    return scores.masked_fill(outside(band, s, t, scores.device), float("-inf"))


def outside(band: Bounds, s: int, t: int, device: torch.device) -> Tensor:
    """(s, t), True where row i does not see key j."""
    lower = -s if band[0] is None else band[0]
    upper = t if band[1] is None else band[1]
    row, column = (torch.arange(n, device=device) for n in (s, t))
    ahead = column[None, :] - row[:, None]
    return (ahead < lower) | (ahead > upper)


def _forward(q, k, v, *, band, mask, scale, keep, shift, scores=None) -> Partial:
    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, v)
    masked = _masked(changed(scores, _scaled(q, k, scale)), band, mask, shift)
    largest = finite(masked.amax(-1))
    weights = torch.exp(masked - largest.unsqueeze(-1))
    total = weights.sum(-1)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    if keep is not None:
        weights = weights * keep
    out = _grouped(weights, k) @ v.to(weights.dtype)
    return out.reshape(*q.shape[:3], v.shape[3]), largest + torch.log(total)


def _backward(
    dout, q, k, v, out, lse, *, band, mask, scale, keep, shift, need_dmask, scores=None
) -> Gradients:
    dtype = accumulator(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        return _none(q, k, v, mask if need_dmask else None, scores)
    dout, shape = dout.to(dtype), (*q.shape[:3], k.shape[2])
    raw = _scaled(q, k, scale)
    masked = _masked(changed(scores, raw), band, mask, shift)
    weights = torch.exp(masked - finite(lse).unsqueeze(-1))
    dropped = weights if keep is None else weights * keep
    dv = _grouped(dropped, k).mT @ _grouped(dout, k)
    dweights = (_grouped(dout, k) @ v.to(dtype).mT).reshape(shape)
    if keep is not None:
        dweights = dweights * keep
    dmasked = weights * (dweights - (dout * out.to(dtype)).sum(-1, keepdim=True))
    dscores, *dleaves = gradients(scores, raw, dmasked)
    dq = (_grouped(dscores, k) @ k.to(dtype)).reshape(q.shape) * scale
    dk = _grouped(dscores, k).mT @ _grouped(q, k).to(dtype) * scale
    dmask = summed_to(dmasked, mask.shape) if need_dmask else None
    return Gradients(dq, dk, dv, dmask, tuple(dleaves))


def _none(q, k, v, mask: Tensor | None, scores: Structure | None) -> Gradients:
    """Of a block without rows or keys."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=accumulator(x.dtype))

    learned = [scores.leaves[i] for i in scores.parsed.learned] if scores else []
    dmask = None if mask is None else zeros(mask)
    return Gradients(zeros(q), zeros(k), zeros(v), dmask, tuple(map(zeros, learned)))


def summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of what was broadcast from ``shape`` to ``x``."""
    dims = [d for d in range(x.dim()) if shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def _fits(case: Case) -> bool:
    return not case.is_structured


MATH = Kernel("math", _fits, "tile", _forward, _backward)
