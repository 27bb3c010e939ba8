"""The flash_attn packages 3 and 4, where they are installed, as ops that trace.

3 is ``flash_attn_interface`` (flash-attention's folder hopper), 4 is ``flash-attn-4``. (2 is not
used: ATen's flash kernel is its code.) The ops take and give (batch, heads, seq, dim), which in
memory is what the packages want: (batch, seq, heads, dim). ``left`` and ``right`` are a window that
is aligned with the last row and the last key; None is unbounded. Version 4 sees only the first
``used`` keys of a batch, int32 (batch), where it is told so.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mosaic.api.errors import UnsupportedError
from mosaic.attention.kernels.kernel import (
    MOST_BATCHES,
    Case,
    Gradients,
    Kernel,
    multiple_of,
    multiple_of_8,
    narrowed,
    seq_first,
    whole_lse,
    widened,
    window,
    without_padding,
)
from mosaic.attention.merge import Partial

#: Of head dims, in version 4.
STEP_4 = 32
_MODULES = {
    3: "flash_attn_interface",
    4: "flash_attn.cute.interface",
}


@cache
def _installed(version: int) -> bool:
    """Without importing it: a graph may be being traced, with fake tensors."""
    package, *inner = _MODULES[version].split(".")
    spec = find_spec(package)
    if spec is None or not inner:
        return spec is not None
    folders = spec.submodule_search_locations or []
    return any(Path(folder, *inner).with_suffix(".py").is_file() for folder in folders)


def imported(version: int) -> Any:
    try:
        return import_module(_MODULES[version])
    except ImportError as error:
        raise UnsupportedError(
            f"flash_attn {version} is installed, and cannot be imported",
            reason=error,
            fix="install what it needs, or remove it: ATen's kernels then do its work",
        ) from error


def _options(version: int, scale: float, left: int | None, right: int | None) -> dict[str, Any]:
    """How each package is told of the scale and the window. 4 has None for unbounded, not -1."""
    causal = (left, right) == (None, 0)
    if version == 4:
        sides: list[int | None] = [None, None] if causal else [left, right]
    else:
        sides = [-1 if side is None or causal else side for side in (left, right)]
    options = {"softmax_scale": scale, "window_size_left": sides[0], "window_size_right": sides[1]}
    return {**options, "causal": causal}


@torch.library.custom_op(
    "mosaic::flash_attn",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, int? left, int? right, int version, "
    "Tensor? used) -> (Tensor, Tensor)",
)
def flash_attn(q, k, v, scale, left, right, version, used):
    """out (batch, heads, s, v_dim) and lse (batch, heads, s)."""
    module = imported(version)
    options = _options(version, scale, left, right)
    tensors = [seq_first(x) for x in (q, k, v)]
    if version == 4:
        options |= {} if used is None else {"seqused_k": used}
        out, lse, *_ = module._flash_attn_fwd(*tensors, **options, return_lse=True)
    else:
        out, lse, *_ = module._flash_attn_forward(*tensors, **options)
    return seq_first(out.contiguous()), lse.contiguous()


@flash_attn.register_fake
def _(q, k, v, scale, left, right, version, used):
    batch, heads, s, _ = q.shape
    out = q.new_empty([batch, s, heads, v.shape[3]])
    return seq_first(out), q.new_empty([batch, heads, s], dtype=torch.float32)


@torch.library.custom_op(
    "mosaic::flash_attn_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "int? left, int? right, int version, Tensor? used) -> (Tensor, Tensor, Tensor)",
)
def flash_attn_backward(dout, q, k, v, out, lse, scale, left, right, version, used):
    """dq, dk and dv, each shaped like its input."""
    module = imported(version)
    options = _options(version, scale, left, right)
    dout, q, k, v, out = (seq_first(x) for x in (dout, q, k, v, out))
    new = torch.empty if used is None else torch.zeros  # what is not used is not written
    grads = [new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    options.update(zip(("dq", "dk", "dv"), grads, strict=True))
    if version == 4:
        options |= {} if used is None else {"seqused_k": used}
        module._flash_attn_bwd(q, k, v, out, dout, lse, **options)
    else:
        options["is_causal"] = options.pop("causal")
        module._flash_attn_backward(dout, q, k, v, out, lse, **options)
    dq, dk, dv = (seq_first(grad) for grad in grads)
    return dq, dk, dv


@flash_attn_backward.register_fake
def _(dout, q, k, v, out, lse, scale, left, right, version, used):
    dq, dk, dv = (seq_first(x.new_empty(seq_first(x).shape)) for x in (q, k, v))
    return dq, dk, dv


def _dims(version: int, head_dim: int, v_dim: int) -> tuple[int, int]:
    """The padded dims of q and k, and of v. Tiles of version 4 go by the first, so that it must not
    be the smaller; before it they are equal.

    Version 3 wants multiples of 8. On Hopper, 4's backward sums up queries in tiles as wide as the
    next multiple of 16, and reads those sums as of the next multiple of 32 (4.0.0b36: dq is wrong,
    silently, for head dims 16, 48, 80 and 112).
    """
    widest = max(head_dim, v_dim)
    if version == 4:
        return multiple_of(STEP_4, widest), multiple_of(STEP_4, v_dim)
    return multiple_of_8(widest), multiple_of_8(widest)


def _kernel(version: int, capabilities: range) -> Kernel:
    def forward(q, k, v, *, band, scale, used=None, **_) -> Partial:
        dim, v_dim = _dims(version, q.shape[-1], v.shape[-1])
        wide = (widened(q, dim), widened(k, dim), widened(v, v_dim))
        sides = window(band, q.shape[2], k.shape[2])
        out, lse = torch.ops.mosaic.flash_attn(*wide, scale, *sides, version, used)
        return narrowed(out, v.shape[-1]), whole_lse(lse, q.shape[2])

    def backward(dout, q, k, v, out, lse, *, band, scale, used=None, **_) -> Gradients:
        dim, v_dim = _dims(version, q.shape[-1], v.shape[-1])
        dout, out = (widened(x.to(q.dtype), v_dim) for x in (dout, out))
        wide = (dout, widened(q, dim), widened(k, dim), widened(v, v_dim), out)
        sides = window(band, q.shape[2], k.shape[2])
        op = torch.ops.mosaic.flash_attn_backward
        grads = op(*wide, lse.contiguous(), scale, *sides, version, used)
        return without_padding(grads, q, k, v)

    def fits(case: Case) -> bool:
        widest = 128 if case.capability > 9 and version == 4 else 256
        able = case.plain and case.half_on_cuda and case.capability in capabilities
        return able and max(case.head_dim, case.v_dim) <= widest and _installed(version)

    return Kernel(f"flash_attn {version}", fits, "native", forward, backward, MOST_BATCHES)


FLASH_ATTN_3 = _kernel(3, range(9, 10))
FLASH_ATTN_4 = _kernel(4, range(9, 12))
