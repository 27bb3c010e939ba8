"""ATen's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.kernels.kernel import Case, Gradients, Kernel
from mosaic.attention.merge import Partial
from mosaic.torch_private import torch_version

# --- flash attention on CPU -------------------------------------------------------------------


def _cpu_forward(q, k, v, *, band, scale, **_) -> Partial:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(q, k, v, 0.0, band == (None, 0), scale=scale)
    return out, lse.contiguous()  # its lse is (batch, seq, heads) in memory


def _cpu_backward(dout, q, k, v, out, lse, *, band, scale, **_) -> Gradients:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dout, out, lse = dout.to(q.dtype), out.to(q.dtype), lse.contiguous()
    return (*op(dout, q, k, v, out, lse, 0.0, band == (None, 0), scale=scale), None)


# --- flash attention on CUDA ------------------------------------------------------------------


def _multiple_of_8(x: Tensor) -> Tensor:
    """Zeros behind head_dim: they change no score and add empty columns to the output."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _cuda_forward(q, k, v, *, band, scale, **_) -> Partial:
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    padded = [_multiple_of_8(x) for x in (q, k, v)]
    out, lse, *_ = op(*padded, 0.0, band == (None, 0), False, scale=scale)
    return out[..., : v.shape[-1]], lse


def _cuda_backward(dout, q, k, v, out, lse, *, band, scale, **_) -> Gradients:
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    dout, q8, k8, v8, out = (
        _multiple_of_8(x) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))
    )
    state = torch.zeros(
        [], dtype=torch.int64, device=q.device
    )  # the generator's; there is no dropout
    lengths = (None, None, q.shape[2], k.shape[2])
    lse = lse.contiguous()  # it is read without its strides: wrong gradients, silently
    grads = op(
        dout, q8, k8, v8, out, lse, *lengths, 0.0, band == (None, 0), state, state, scale=scale
    )
    return (*(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)), None)


def _fits_cuda_flash(case: Case) -> bool:
    half = case.dtype in (torch.float16, torch.bfloat16)
    fits = case.plain and case.head_dim == case.v_dim <= 256
    return case.device == "cuda" and half and fits


#: Before torch 2.13 the CPU flash op tells the tracer that its LSE of float64 is float32, and
#: what is traced then rounds it (2.11: losses off by 1e-8).
_ROUNDED_LSE = {torch.float64} if torch_version() < (2, 13) else set()


def _fits_cpu_flash(case: Case) -> bool:
    fits = case.plain and case.head_dim == case.v_dim
    return case.device == "cpu" and fits and case.dtype not in _ROUNDED_LSE


CPU_FLASH = Kernel("cpu flash", _fits_cpu_flash, False, _cpu_forward, _cpu_backward)
CUDA_FLASH = Kernel("flash", _fits_cuda_flash, False, _cuda_forward, _cuda_backward)
