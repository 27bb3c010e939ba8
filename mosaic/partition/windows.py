"""What slides over an axis. Along it a rank gets the ends of its windows from its neighbours
(``mosaic::halo``, whose gradient goes back to its owners and is added there)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mosaic.layout.windows import Part, Windows
from mosaic.partition import empty
from mosaic.partition.decomposed import decomposed
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.normalization import others_whole
from mosaic.partition.probing import NotLocalError, Prober
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
AS_FACTOR = "slides over a dim in which the sharded axis is only a factor"


def slide(
    s: ShardingInterpreter,
    c: Call,
    x: Value,
    windows: Windows,
    local: Callable[[Value, int], Value],
    fill: float = 0,
) -> Value:
    """``local(window, number of outputs)`` for every interval of this rank's outputs."""
    assert x.place is not None
    place = x.cut.refined()
    if (place.outer, place.inner) != (1, 1) or not place.layout.n:
        return s.gather_for(c, AS_FACTOR)
    if isinstance(s, Prober):  # an axis begins behind the patches that it is made of
        raise NotLocalError
    out = place.with_layout(windows.outputs(place.layout, s.axis.layout))
    near = s.halo(x, place, place.with_layout(windows.needed(out.layout)))
    if not s.emitter:
        return Value(c.val, out)
    made = []
    for part, outputs in s.on_rank(lambda rank: whose(windows, out.layout, rank)):
        window = cut(s, c, near, place.dim, part, fill)
        made.append(s.node(local(Value(x.val, place, window), outputs)))
    node = (
        made[0] if len(made) == 1 else s.emitter.op(c.like, aten.cat.default, (made, out.dim), {})
    )
    return empty.rows_of(s, c, Value(c.val, out, node), out)


def whose(windows: Windows, outputs: Any, rank: int) -> list[tuple[Part, int]]:
    """Every interval's part and its length; of a rank that makes nothing one window of fill, whose
    output is dropped, so that it too takes part in what the ranks do together."""
    lengths = [interval.length for interval in outputs.ranks[rank]]
    parts = windows.parts(outputs, rank)
    return list(zip(parts, lengths, strict=True)) or [(Part(0, 0, windows.size, 0), 1)]


def cut(s: ShardingInterpreter, c: Call, near: Value, dim: int, part: Part, fill: float) -> fx.Node:
    assert s.emitter
    stretch = (s.node(near), dim, part.start, part.stop)
    node = s.emitter.op(c.like, aten.slice.Tensor, stretch, {})
    if not (part.before or part.after):
        return node
    pads = [0, 0] * (near.ndim - 1 - dim) + [part.before, part.after]
    return s.emitter.op(c.like, aten.constant_pad_nd.default, (node, pads, fill), {})


# --- convolutions -------------------------------------------------------------------------------


def convolution(s: ShardingInterpreter, c: Call) -> Value:
    """Batches are free, and so is every dim where the kernel has length 1; along another one ranks
    exchange the ends of their windows."""
    x, spatial = c["input"], c["weight"].ndim - 2
    dim = x.cut.dim - (x.ndim - spatial) if x.place else -1
    if x.place is None or (dim < 0 and (x.cut.dim or x.ndim == spatial + 1)):
        return s.gather_for(c, "sums over its channels")
    whole = others_whole(s, c)
    if dim < 0:
        return s.emit(c, x.place, **whole)
    paddings = padded(c, spatial)
    if paddings is None or c.bound.get("transposed"):
        return s.gather_for(c, "slides over the axis")
    stride, dilation = (spread(c[n], spatial) for n in ("stride", "dilation"))
    kernel = c["weight"].shape[2 + dim]
    if (kernel, stride[dim], paddings[dim]) == (1, 1, 0):
        return empty.emit(s, c, x.place, "input", **whole)
    target = [aten.conv1d, aten.conv2d, aten.conv3d][spatial - 1].default
    inside = [0 if d == dim else n for d, n in enumerate(paddings)]

    def local(window: Value, outputs: int) -> Value:
        kept = (whole.get("bias"), stride, inside, dilation, c["groups"])
        args = (window, whole["weight"], *kept)
        return s.emit(Call(target, args, {}, c.val, c.like), x.place)

    size = dilation[dim] * (kernel - 1) + 1
    windows = Windows(x.cut.size, c.val.shape[x.cut.dim], size, stride[dim], paddings[dim])
    return slide(s, c, x, windows, local)


def padded(c: Call, spatial: int) -> list[int] | None:
    """How much stands before each dim; None if not as much stands behind it."""
    if not isinstance(c["padding"], str):
        return spread(c["padding"], spatial)
    if c["padding"] == "valid":
        return [0] * spatial
    sizes = [d * (k - 1) for d, k in zip(spread(c["dilation"], spatial), c["weight"].shape[2:],
                                         strict=True)]  # fmt: skip
    return None if any(n % 2 for n in sizes) else [n // 2 for n in sizes]


def spread(sizes: Any, spatial: int) -> list[int]:
    """One number for each dim."""
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return sizes * spatial if len(sizes) == 1 else sizes


# --- pools --------------------------------------------------------------------------------------


def pool(s: ShardingInterpreter, c: Call) -> Any:
    """avg_pool and max_pool: batches and channels are free; along another dim as a convolution."""
    x, spatial = c.x, len_of(c)
    dim = x.cut.dim - (x.ndim - spatial)
    if dim < 0:
        return empty.emit(s, c, x.cut)
    kernel = spread(c["kernel_size"], spatial)
    stride = spread(c["stride"] or kernel, spatial)
    padding, dilation = spread(c["padding"], spatial), spread(c.bound.get("dilation", 1), spatial)
    counts = not c.bound.get("count_include_pad", True) and padding[dim]
    if isinstance(c.val, (tuple, list)) or c["ceil_mode"] or counts:
        return s.gather_for(c, "slides over the axis")
    new: dict[str, Any] = {"padding": [0 if d == dim else n for d, n in enumerate(padding)]}

    def local(window: Value, outputs: int) -> Value:
        return s.emit(c, x.place, self=window, **new)

    size = dilation[dim] * (kernel[dim] - 1) + 1
    windows = Windows(x.cut.size, c.val.shape[x.cut.dim], size, stride[dim], padding[dim])
    return slide(s, c, x, windows, local, -float("inf") if "max" in c.name else 0)


def len_of(c: Call) -> int:
    return next(n for n in (1, 2, 3) if f"{n}d" in c.name)


def adaptive_pool(s: ShardingInterpreter, c: Call) -> Any:
    """Batches and channels are free; along another dim windows of one length, where they are."""
    x, spatial = c.x, len_of(c)
    dim = x.cut.dim - (x.ndim - spatial)
    if dim < 0:
        return empty.emit(s, c, x.cut)
    sizes = spread(c["output_size"], spatial)
    n, m = x.cut.size, sizes[dim]
    if isinstance(c.val, (tuple, list)) or m == 1 or not m or n % m:
        return decomposed(s, c)

    def local(window: Value, outputs: int) -> Value:
        there = [outputs if d == dim else k for d, k in enumerate(sizes)]
        return s.emit(c, x.place, self=window, output_size=there)

    return slide(s, c, x, Windows(n, m, n // m, n // m, 0), local)


def unfold(s: ShardingInterpreter, c: Call) -> Value:
    """The windows are a dim where the axis was, their elements a last one."""
    x, dim = c.x, c["dimension"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.place)

    def local(window: Value, outputs: int) -> Value:
        return s.emit(c, x.place, self=window)

    windows = Windows(x.cut.size, c.val.shape[dim], c["size"], c["step"], 0)
    return slide(s, c, x, windows, local)
