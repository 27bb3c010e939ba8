"""Short sequences, as the columns of a table: a Triton kernel with all rows and keys on the chip.

Other kernels have tiles of 64 or 128 rows, which a sequence of 11 leaves empty, and a batch in a
dim of the grid that ends at 65,535. Here the grid has one dim, of problems: a batch and a head of
keys each. A band is compiled in; a mask of keys is read.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from mosaic.attention.kernels.kernel import KEYS, Bounds, Case, Gradients, Kernel, seq_first
from mosaic.attention.merge import Partial, accumulator

#: Rows of a head, and keys: what the registers hold. Products of float32 are not those of TF32.
MOST_TOKENS, MOST_TOKENS_SINGLE = 128, 32
#: Wider heads leave too few registers.
MOST_DIMS = 64
#: Numbers of a problem's keys: with so few, most of a program is its start.
FEW = 64
#: Triton's matrix products are of no less.
LEAST = 16


@torch.library.custom_op(
    "mosaic::short",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? seen, float scale, int? lower, int? upper) "
    "-> (Tensor, Tensor)",
)
def short(q, k, v, seen, scale, lower, upper):
    """out and lse. ``seen``: boolean (batch|1, 1, 1, t|1)."""
    out, lse = unwritten(q, k, v)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    launch("forward", tensors, seen, scale, (lower, upper))
    return out, lse


@short.register_fake
def unwritten(q, k, v, *_):
    return like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "mosaic::short_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? seen, Tensor out, Tensor lse, "
    "float scale, int? lower, int? upper) -> (Tensor, Tensor, Tensor)",
)
def short_backward(dout, q, k, v, seen, out, lse, scale, lower, upper):
    """dq, dk and dv, of the global out and lse."""
    dq, dk, dv = (like(x, x.shape[3]) for x in (q, k, v))
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    tensors |= {"dq": dq, "dk": dk, "dv": dv}
    launch("backward", tensors, seen, scale, (lower, upper))
    return dq, dk, dv


@short_backward.register_fake
def _(dout, q, k, v, *_):
    dq, dk, dv = (like(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv


def like(x: Tensor, dim: int) -> Tensor:
    """(batch, heads, seq, dim), in memory (batch, seq, heads, dim)."""
    batch, heads, n, _ = x.shape
    return seq_first(x.new_empty([batch, n, heads, dim]))


def launch(
    name: str, tensors: dict[str, Tensor], seen: Tensor | None, scale: float, band: Bounds
) -> None:
    """Run a kernel of ``short_triton`` over all problems."""
    kernel = getattr(import_module("mosaic.attention.kernels.short_triton"), name)
    (batch, heads, s, d), (_, kv_heads, t, e) = tensors["q"].shape, tensors["v"].shape
    rows, keys, d_width, e_width = (padded(n) for n in (s, t, d, e))
    loop = 4 if t * d <= FEW else 1
    warps = 1 if rows * keys * tensors["q"].itemsize <= 2048 else 4
    problems = batch * kv_heads
    with torch.cuda.device_of(tensors["q"]):
        kernel[(-(-problems // loop),)](
            **tensors,
            **{f"at_{key}": strides(x) for key, x in tensors.items() if x.ndim == 4},
            mask=seen,
            at_mask=None if seen is None else strides(seen)[::3],
            lower=band[0],
            upper=band[1],
            scale=scale,
            problems=problems,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            s=s,
            t=t,
            d=d,
            e=e,
            rows=rows,
            keys=keys,
            d_width=d_width,
            e_width=e_width,
            loop=loop,
            num_warps=warps,
        )


def padded(n: int) -> int:
    """To a power of 2."""
    return max(LEAST, 1 << (n - 1).bit_length())


def strides(x: Tensor) -> tuple[int, ...]:
    """0 where there is no other number, or the same."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _forward(q, k, v, *, band, mask, scale, **_) -> Partial:
    seen = None if mask is None else mask.keys()
    return torch.ops.mosaic.short(q, k, v, seen, scale, *band)


def _backward(dout, q, k, v, out, lse, *, band, mask, scale, **_) -> Gradients:
    seen = None if mask is None else mask.keys()
    op = torch.ops.mosaic.short_backward
    return Gradients(*op(dout, q, k, v, seen, out, lse.contiguous(), scale, *band))


def _kernel(name: str, dtypes: tuple[torch.dtype, ...], most: int) -> Kernel:
    def fits(case: Case) -> bool:
        able = case.device == "cuda" and case.capability >= 8 and find_spec("triton") is not None
        known = case.dtype in dtypes and max(case.head_dim, case.v_dim) <= MOST_DIMS
        plain = case.mask in (None, KEYS) and not (case.dropout or case.empty or case.scores)
        return able and known and plain

    return Kernel(name, fits, "native", _forward, _backward, most_tokens=most)


SHORT = _kernel("short", (torch.float16, torch.bfloat16), MOST_TOKENS)
SHORT_SINGLE = _kernel("short float32", (torch.float32,), MOST_TOKENS_SINGLE)
