"""ATen's own kernels: flash attention on CPU and CUDA, cuDNN's, and the memory-efficient one."""

from __future__ import annotations

import torch
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
    window,
    without_padding,
)
from mosaic.attention.merge import Partial
from mosaic.torch_private import torch_version

aten = torch.ops.aten


def _no_seed(q: Tensor) -> Tensor:
    """The state of a generator that is not used: there is no dropout."""
    return torch.zeros([], dtype=torch.int64, device=q.device)


# --- flash attention on CPU -------------------------------------------------------------------


def _cpu_forward(q, k, v, *, band, scale, **_) -> Partial:
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(q, k, v, 0.0, band == (None, 0), scale=scale)
    return out, whole_lse(lse, q.shape[2])


def _cpu_backward(dout, q, k, v, out, lse, *, band, scale, **_) -> Gradients:
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dout, out, lse = dout.to(q.dtype), out.to(q.dtype), lse.contiguous()
    return Gradients(*op(dout, q, k, v, out, lse, 0.0, band == (None, 0), scale=scale))


#: Before torch 2.13 the CPU flash op tells the tracer that its LSE of float64 is float32, and
#: what is traced then rounds it (2.11: losses off by 1e-8).
_ROUNDED_LSE = {torch.float64} if torch_version() < (2, 13) else set()


def _fits_cpu_flash(case: Case) -> bool:
    fits = case.plain and case.head_dim == case.v_dim
    return case.device == "cpu" and fits and case.dtype not in _ROUNDED_LSE


# --- flash attention 2 on CUDA ----------------------------------------------------------------


def _flash_sides(q: Tensor, k: Tensor, band: Bounds) -> dict[str, int | None]:
    left, right = window(band, q.shape[2], k.shape[2])
    return {"window_size_left": left, "window_size_right": right}


def _flash_forward(q, k, v, *, band, scale, **_) -> Partial:
    sides = _flash_sides(q, k, band)
    dim = multiple_of_8(max(q.shape[-1], v.shape[-1]))
    wide = [seq_first(widened(x, dim)) for x in (q, k, v)]
    lengths = (None, None, q.shape[2], k.shape[2])
    op = aten._flash_attention_forward.default
    out, lse, *_ = op(*wide, *lengths, 0.0, False, False, scale=scale, **sides)
    return narrowed(seq_first(out), v.shape[-1]), whole_lse(lse, q.shape[2])


def _flash_backward(dout, q, k, v, out, lse, *, band, scale, **_) -> Gradients:
    sides = _flash_sides(q, k, band)
    dim = multiple_of_8(max(q.shape[-1], v.shape[-1]))
    inputs = (dout.to(q.dtype), q, k, v, out.to(q.dtype))
    wide = [seq_first(widened(x, dim)) for x in inputs]
    lse = lse.contiguous()  # it is read without its strides: wrong gradients, silently
    lengths = (None, None, q.shape[2], k.shape[2])
    state = (_no_seed(q), _no_seed(q))
    op = aten._flash_attention_backward.default
    grads = op(*wide, lse, *lengths, 0.0, False, *state, scale=scale, **sides)
    return without_padding([seq_first(grad) for grad in grads], q, k, v)


def _fits_flash(case: Case) -> bool:
    fits = case.plain and max(case.head_dim, case.v_dim) <= 256
    return case.half_on_cuda and case.capability >= 8 and fits


# --- cuDNN --------------------------------------------------------------------------------------


def _cudnn_forward(q, k, v, *, band, scale, **_) -> Partial:
    wide = [widened(x, multiple_of_8(x.shape[-1])) for x in (q, k, v)]
    op = aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = op(*wide, None, True, 0.0, band == (None, 0), False, scale=scale)
    return narrowed(out, v.shape[-1]), whole_lse(lse, q.shape[2])


def _cudnn_backward(dout, q, k, v, out, lse, *, band, scale, **_) -> Gradients:
    inputs = (dout.to(q.dtype), q, k, v, out.to(q.dtype))
    wide = [widened(x, multiple_of_8(x.shape[-1])) for x in inputs]
    lse = lse.contiguous().unsqueeze(-1)
    lengths = (None, None, q.shape[2], k.shape[2])
    state = (_no_seed(q), _no_seed(q), None)  # and no bias
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    grads = op(*wide, lse, *state, *lengths, 0.0, band == (None, 0), scale=scale)
    return without_padding(grads, q, k, v)


def _fits_cudnn(case: Case) -> bool:
    fits = case.plain and max(case.head_dim, case.v_dim) <= 128
    return case.half_on_cuda and case.capability >= 9 and fits


CPU_FLASH = Kernel("cpu flash", _fits_cpu_flash, "square", _cpu_forward, _cpu_backward)
FLASH = Kernel("flash", _fits_flash, "short", _flash_forward, _flash_backward, MOST_BATCHES)
CUDNN = Kernel("cudnn", _fits_cudnn, "square", _cudnn_forward, _cudnn_backward, MOST_BATCHES)
