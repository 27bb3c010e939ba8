"""One block of attention: some queries, some keys.

Forward gives the log-sum-exp beside the output; backward takes the *global* output and
log-sum-exp, so that the gradients of blocks add up to the whole one's (research/attention.md 4.2).

    q (batch, heads, s, d)   k (batch, kv_heads, t, d)   v (batch, kv_heads, t, e)
    out (batch, heads, s, e)   lse (batch, heads, s), natural log, float32 (float64 for float64)

``causal`` is the aligned triangle of a square block. ``mask`` is (batch|1, heads|1, s|1, t|1),
boolean (True attends) or added to the scores. ``keep`` is a dropout mask, 0 or 1 / (1 - p).
``shift`` (batch|1, heads|1, s|1, 1) is taken off every score of a row, of all blocks alike.
A row that sees no key has out 0, lse -inf and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.merge import Partial, accumulator, finite, nothing
from mosaic.torch_private import torch_version

#: dq, dk, dv, and the gradient of a mask that needs one.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Kernel(NamedTuple):
    fits: Callable[..., bool]
    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]


def forward(
    q,
    k,
    v,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
) -> Partial:
    """out and lse of one block."""
    options = {"causal": causal, "mask": mask, "scale": scale, "keep": keep, "shift": shift}
    return _choose(q, k, v, mask, keep).forward(q, k, v, **options)


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
    need_dmask: bool = False,
) -> Gradients:
    """This block's part of dq, dk, dv (and of the mask's gradient, in the mask's shape)."""
    options = {
        "causal": causal,
        "mask": mask,
        "scale": scale,
        "keep": keep,
        "shift": shift,
        "need_dmask": need_dmask,
    }
    return _choose(q, k, v, mask, keep).backward(dout, q, k, v, out, lse, **options)


def _choose(q, k, v, mask, keep) -> Kernel:
    """The first kernel that fits; none but the last does masks, dropout or empty blocks."""
    plain = mask is None and keep is None and q.numel() > 0 and k.numel() > 0
    plain = plain and q.shape[-1] == v.shape[-1]
    return next(kernel for kernel in KERNELS if kernel is MATH or (plain and kernel.fits(q)))


# --- plain math -----------------------------------------------------------------------------


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, s, x) -> (batch, kv_heads, group * s, x): a group shares its keys."""
    batch, _, s, x = q.shape
    return q.reshape(batch, k.shape[1], q.shape[1] // k.shape[1] * s, x)


def _scores(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float, shift: Tensor | None
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
    if causal:
        row, column = (torch.arange(n, device=q.device) for n in scores.shape[2:])
        scores = scores.masked_fill(row[:, None] < column[None, :], float("-inf"))
    return scores


def _math_forward(q, k, v, *, causal, mask, scale, keep, shift) -> Partial:
    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, v)
    scores = _scores(q, k, causal, mask, scale, shift)
    largest = finite(scores.amax(-1))
    weights = torch.exp(scores - largest.unsqueeze(-1))
    total = weights.sum(-1)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    if keep is not None:
        weights = weights * keep
    out = _grouped(weights, k) @ v.to(weights.dtype)
    return out.reshape(*q.shape[:3], v.shape[3]), largest + torch.log(total)


def _math_backward(
    dout, q, k, v, out, lse, *, causal, mask, scale, keep, shift, need_dmask
) -> Gradients:
    dtype = accumulator(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        dmask = torch.zeros_like(mask, dtype=dtype) if need_dmask else None
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        return dq, dk, dv, dmask
    dout, shape = dout.to(dtype), (*q.shape[:3], k.shape[2])
    weights = torch.exp(_scores(q, k, causal, mask, scale, shift) - finite(lse).unsqueeze(-1))
    dropped = weights if keep is None else weights * keep
    dv = _grouped(dropped, k).mT @ _grouped(dout, k)
    dweights = (_grouped(dout, k) @ v.to(dtype).mT).reshape(shape)
    if keep is not None:
        dweights = dweights * keep
    dscores = weights * (dweights - (dout * out.to(dtype)).sum(-1, keepdim=True))
    dq = (_grouped(dscores, k) @ k.to(dtype)).reshape(q.shape) * scale
    dk = _grouped(dscores, k).mT @ _grouped(q, k).to(dtype) * scale
    return dq, dk, dv, _summed_to(dscores, mask.shape) if need_dmask else None


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of what was broadcast from ``shape`` to ``x``."""
    dims = [d for d in range(x.dim()) if shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


# --- flash attention on CPU -------------------------------------------------------------------


def _cpu_forward(q, k, v, *, causal, scale, **_) -> Partial:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(q, k, v, 0.0, causal, scale=scale)
    return out, lse.contiguous()  # its lse is (batch, seq, heads) in memory


def _cpu_backward(dout, q, k, v, out, lse, *, causal, scale, **_) -> Gradients:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dout, out, lse = dout.to(q.dtype), out.to(q.dtype), lse.contiguous()
    return (*op(dout, q, k, v, out, lse, 0.0, causal, scale=scale), None)


# --- flash attention on CUDA ------------------------------------------------------------------


def _multiple_of_8(x: Tensor) -> Tensor:
    """Zeros behind head_dim: they change no score and add empty columns to the output."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _cuda_forward(q, k, v, *, causal, scale, **_) -> Partial:
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    padded = [_multiple_of_8(x) for x in (q, k, v)]
    out, lse, *_ = op(*padded, 0.0, causal, False, scale=scale)
    return out[..., : v.shape[-1]], lse


def _cuda_backward(dout, q, k, v, out, lse, *, causal, scale, **_) -> Gradients:
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    dout, q8, k8, v8, out = (
        _multiple_of_8(x) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))
    )
    state = torch.zeros(
        [], dtype=torch.int64, device=q.device
    )  # the generator's; there is no dropout
    lengths = (None, None, q.shape[2], k.shape[2])
    lse = lse.contiguous()  # it is read without its strides: wrong gradients, silently
    grads = op(dout, q8, k8, v8, out, lse, *lengths, 0.0, causal, state, state, scale=scale)
    return (*(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)), None)


def _fits_cuda_flash(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


#: Before torch 2.13 the CPU flash op tells the tracer that its LSE of float64 is float32, and
#: what is traced then rounds it (2.11: losses off by 1e-8).
_ROUNDED_LSE = {torch.float64} if torch_version() < (2, 13) else set()


def _fits_cpu_flash(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype not in _ROUNDED_LSE


MATH = Kernel(lambda q: True, _math_forward, _math_backward)

#: Which kernel does a block: the first that fits. ``MATH`` is right for everything.
KERNELS = (
    Kernel(_fits_cuda_flash, _cuda_forward, _cuda_backward),
    Kernel(_fits_cpu_flash, _cpu_forward, _cpu_backward),
    MATH,
)
