"""FlashAttention 4, where the package ``flash-attn-4`` is installed, as ops that trace.

(Of older ones 2 is ATen's flash kernel, and 3 has not been tried.) The ops take and give (batch,
heads, seq, dim), which in memory is what the package wants: (batch, seq, heads, dim). ``left`` and
``right`` are a window that is aligned with the last row and the last key; None is unbounded. Only
the first ``used`` keys of a batch are seen, int32 (batch), where that is given. Scores become
cap * tanh(score), where ``cap`` is not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention.kernels.kernel import (
    MOST_BATCHES,
    Case,
    Gradients,
    Kernel,
    multiple_of,
    narrowed,
    seq_first,
    whole_lse,
    widened,
    window,
    without_padding,
)
from mosaic.attention.merge import Partial
from mosaic.attention.structure import Structure

#: What head dims are padded to a multiple of. On Hopper, backward sums up queries in tiles as wide
#: as the next multiple of 16, and reads those sums as of the next multiple of 32 (4.0.0b36: dq is
#: wrong, silently, for head dims 16, 48, 80 and 112).
STEP = 32
MODULE = "flash_attn.cute.interface"


@cache
def _installed() -> bool:
    """Without importing it: a graph may be being traced, with fake tensors."""
    package, *inner = MODULE.split(".")
    spec = find_spec(package)
    folders = spec.submodule_search_locations or [] if spec else []
    return any(Path(folder, *inner).with_suffix(".py").is_file() for folder in folders)


def imported() -> Any:
    try:
        return import_module(MODULE)
    except ImportError as error:
        raise UnsupportedError(
            "flash_attn 4 is installed, and cannot be imported",
            reason=error,
            fix="install what it needs, or remove it: ATen's kernels then do its work",
        ) from error


def _options(
    scale: float, left: int | None, right: int | None, used: Tensor | None
) -> dict[str, Any]:
    causal = (left, right) == (None, 0)
    sides: list[int | None] = [None, None] if causal else [left, right]
    options = {"softmax_scale": scale, "window_size_left": sides[0], "window_size_right": sides[1]}
    return {**options, "causal": causal, **({} if used is None else {"seqused_k": used})}


@lru_cache(maxsize=64)
def cap_mods(cap: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What becomes of scaled scores, and of their gradients. (The package's own softcap divides
    each score: 16,384 tokens took 22.4 ms on an H200, forward and backward, and take 16.6.)"""
    tanh = import_module("cutlass.cute").math.tanh

    def forward(score, *_, **__):
        return cap * tanh(score, fastmath=True)

    def backward(dcapped, score, *_, **__):
        bounded = tanh(score, fastmath=True)
        return dcapped * (cap - cap * bounded * bounded)

    mods: Any = forward, backward
    for mod in mods:
        mod.__cute_hash__ = f"{__name__} {mod.__name__} {cap}"
    return mods


def cap_options(cap: float, backward: bool = False) -> dict[str, Any]:
    """What the package is told of a softcap."""
    if not cap:
        return {}
    return dict(zip(("score_mod", "score_mod_bwd")[: 1 + backward], cap_mods(cap), strict=False))


@torch.library.custom_op(
    "mosaic::flash_attn",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, int? left, int? right, Tensor? used, "
    "float cap) -> (Tensor, Tensor)",
)
def flash_attn(q, k, v, scale, left, right, used, cap):
    """out (batch, heads, s, v_dim) and lse (batch, heads, s)."""
    options = _options(scale, left, right, used) | cap_options(cap)
    tensors = [seq_first(x) for x in (q, k, v)]
    out, lse, *_ = imported()._flash_attn_fwd(*tensors, **options, return_lse=True)
    return seq_first(out.contiguous()), lse.contiguous()


@flash_attn.register_fake
def _(q, k, v, *_):
    batch, heads, s, _ = q.shape
    out = q.new_empty([batch, s, heads, v.shape[3]])
    return seq_first(out), q.new_empty([batch, heads, s], dtype=torch.float32)


@torch.library.custom_op(
    "mosaic::flash_attn_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "int? left, int? right, Tensor? used, float cap) -> (Tensor, Tensor, Tensor)",
)
def flash_attn_backward(dout, q, k, v, out, lse, scale, left, right, used, cap):
    """dq, dk and dv, each shaped like its input."""
    dout, q, k, v, out = (seq_first(x) for x in (dout, q, k, v, out))
    new = torch.empty if used is None else torch.zeros  # what is not used is not written
    grads = [new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    into = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    options = _options(scale, left, right, used) | cap_options(cap, backward=True)
    imported()._flash_attn_bwd(q, k, v, out, dout, lse, **options, **into)
    dq, dk, dv = (seq_first(grad) for grad in grads)
    return dq, dk, dv


@flash_attn_backward.register_fake
def _(dout, q, k, v, *_):
    dq, dk, dv = (seq_first(x.new_empty(seq_first(x).shape)) for x in (q, k, v))
    return dq, dk, dv


def _dims(head_dim: int, v_dim: int) -> tuple[int, int]:
    """The padded dims of q and k, and of v: tiles go by the first, which must not be smaller."""
    return multiple_of(STEP, max(head_dim, v_dim)), multiple_of(STEP, v_dim)


def cap_of(scores: Structure | None) -> float:
    return scores.parsed.softcap if scores else 0.0


def _forward(q, k, v, *, band, scale, used=None, scores=None, **_) -> Partial:
    dim, v_dim = _dims(q.shape[-1], v.shape[-1])
    wide = (widened(q, dim), widened(k, dim), widened(v, v_dim))
    sides = window(band, q.shape[2], k.shape[2])
    out, lse = torch.ops.mosaic.flash_attn(*wide, scale, *sides, used, cap_of(scores))
    return narrowed(out, v.shape[-1]), whole_lse(lse, q.shape[2])


def _backward(dout, q, k, v, out, lse, *, band, scale, used=None, scores=None, **_) -> Gradients:
    dim, v_dim = _dims(q.shape[-1], v.shape[-1])
    dout, out = (widened(x.to(q.dtype), v_dim) for x in (dout, out))
    wide = (dout, widened(q, dim), widened(k, dim), widened(v, v_dim), out)
    sides = window(band, q.shape[2], k.shape[2])
    options = (scale, *sides, used, cap_of(scores))
    grads = torch.ops.mosaic.flash_attn_backward(*wide, lse.contiguous(), *options)
    return without_padding(grads, q, k, v)


def _fits(case: Case) -> bool:
    widest = 128 if case.capability > 9 else 256
    capped = case.capped and case.capability == 9  # where it was tried
    able = (case.plain or capped) and case.half_on_cuda and case.capability in range(9, 12)
    return able and max(case.head_dim, case.v_dim) <= widest and _installed()


FLASH_ATTN_4 = Kernel("flash_attn 4", _fits, "native", _forward, _backward, MOST_BATCHES)
