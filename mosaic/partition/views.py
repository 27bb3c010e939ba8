"""Views, joins and cuts: functions on intervals, without communication wherever it is possible."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch

from mosaic.graph.ops import differentiable
from mosaic.layout import Layout, Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten


def viewed(place: Place, before: torch.Size, after: torch.Size) -> Place | None:
    """Where the axis sits after a reshape: the run of elements outside x axis x inside survives.

    ``(B, R, C)`` with R sharded -> ``(B*R, C)`` has outer = B; None if the axis is torn apart.
    """
    outside = prod(before[: place.dim]) * place.outer
    n = place.layout.n
    if not outside and n:
        return viewed_from_right(place, before, after)
    reach = 1
    for dim, size in enumerate(after):
        if reach and outside % reach == 0 and (reach * size) % (outside * n or 1) == 0:
            inner = reach * size // (outside * n) if n else 0
            return replace(place, dim=dim, outer=outside // reach, inner=inner)
        reach *= size
    return None


def viewed_from_right(place: Place, before: torch.Size, after: torch.Size) -> Place | None:
    """``viewed`` where another axis, outside of this one, has no elements on this rank."""
    inside = place.inner * prod(before[place.dim + 1 :])
    n = place.layout.n
    reach = 1
    for dim in reversed(range(len(after))):
        size = after[dim]
        if inside and inside % reach == 0 and (reach * size) % (inside * n) == 0:
            inner = inside // reach
            return replace(place, dim=dim, outer=size // (n * inner), inner=inner)
        reach *= size
    return None


def split_axis(place: Place, before: torch.Size, after: torch.Size) -> Place | None:
    """The axis itself is cut in two (n -> n1 x n2): local if no interval tears a row of n2."""
    if place.outer != 1:
        return None
    outside = prod(before[: place.dim])
    place = place.refined()
    reach = 1
    for dim, size in enumerate(after):
        if reach == outside and size > 1 and place.layout.n % size == 0:
            coarse = place.layout.coarsen(place.layout.n // size)
            return replace(place, dim=dim, layout=coarse, inner=1) if coarse else None
        reach *= size
    return None


def aligned_split(place: Place, before: torch.Size, after: torch.Size) -> Place | None:
    """The axis cut anew, so that a split of it (n -> n1 x n2) tears no row of n2."""
    place = place.refined()
    if (place.outer, place.inner) != (1, 1):
        return None
    outside, reach, n = prod(before[: place.dim]), 1, place.layout.n
    for size in after:
        if reach == outside and size > 1 and n % size == 0:
            return place.with_layout(Layout.even(size, place.layout.p).scale(n // size))
        reach *= size
    return None


def view(s: ShardingInterpreter, c: Call) -> Value:
    """Free if the axis survives as one run of elements, or splits where no interval is torn; where
    one is, the axis is first cut elsewhere."""
    x, size = c.x, c.val.shape
    if not x.val.numel() and not (s.is_over_shards and x.cut.layout.n):
        # Without elements there is no telling which dim became which.
        return s.call(c, aten.reshape.default, s.gather(x, "is empty"), list(size))
    place = (
        viewed(x.cut, x.shape, size)
        or viewed(x.cut.coarsened(), x.shape, size)
        or split_axis(x.cut, x.shape, size)
    )
    if place is None:
        whole_rows = aligned_split(x.cut, x.shape, size)
        if whole_rows is None or s.has_recipes(c):
            return s.gather_for(c, f"tears the axis apart: {list(x.shape)} -> {list(size)}")
        return s.call(c, aten.view.default, s.at(x, whole_rows), list(size))
    reshape = Call(aten.reshape.default, (x, s.local(size, place)), {}, c.val, c.like)
    return s.emit(reshape, place)


def expand(s: ShardingInterpreter, c: Call) -> Value:
    """New and widened dims are free."""
    x = c.x
    place = x.cut.at(x.cut.dim + c.val.ndim - x.ndim)
    if c.val.shape[place.dim] != x.shape[x.cut.dim]:
        return s.call(c, aten.expand.default, s.gather(x, "a length of 1 is expanded"), c["size"])
    return s.emit(c, place, size=s.local(c.val.shape, place))


def repeat(s: ShardingInterpreter, c: Call) -> Value:
    """The axis repeats as a longer outer dim."""
    x, times = c.x, c["repeats"]
    dim = x.cut.dim + c.val.ndim - x.ndim
    return s.emit(c, replace(x.cut, dim=dim, outer=x.cut.outer * times[dim]))


def repeat_interleave(s: ShardingInterpreter, c: Call) -> Value:
    """The axis gets an inner dim."""
    x = c.x
    if c["dim"] is None:
        return s.gather_for(c, "flattens the axis")
    here = c["dim"] % x.ndim == x.cut.dim
    place = replace(x.cut, inner=x.cut.inner * c["repeats"]) if here else x.cut
    return s.emit(c, place, output_size=None)  # which is that of the whole


def permute(s: ShardingInterpreter, c: Call) -> Value:
    """The place moves with its dim."""
    x = c.x
    dims = [d % x.ndim for d in c["dims"]]
    return s.emit(c, x.cut.at(dims.index(x.cut.dim)))


def transpose(s: ShardingInterpreter, c: Call) -> Value:
    """The place moves with its dim."""
    x = c.x
    a, b = (c.bound.get("dim0", 0) % x.ndim, c.bound.get("dim1", 1) % x.ndim)
    return s.emit(c, x.cut.at({a: b, b: a}.get(x.cut.dim, x.cut.dim)))


def unsqueeze(s: ShardingInterpreter, c: Call) -> Value:
    """The place moves with its dim."""
    x = c.x
    return s.emit(c, x.cut.at(x.cut.dim + (c["dim"] % c.val.ndim <= x.cut.dim)))


def squeeze(s: ShardingInterpreter, c: Call) -> Value:
    """The place moves with its dim."""
    x = c.x
    named = c.bound.get("dim", list(range(x.ndim)))
    dims = {d % x.ndim for d in ([named] if isinstance(named, int) else named)}
    gone = [d for d in dims if x.shape[d] == 1]
    if x.cut.dim in gone:
        return s.call(c, c.target, s.gather(x, "a length of 1 is dropped"), *_rest(c))
    place = x.cut.at(x.cut.dim - sum(d < x.cut.dim for d in gone))
    # A local shard may have length 1 where the global tensor has not: name the dims.
    return s.emit(Call(aten.squeeze.dims, (x, gone), {}, c.val, c.like), place)


def _rest(c: Call) -> list[Any]:
    return [v for k, v in c.bound.items() if k != "self"]


def slice_(s: ShardingInterpreter, c: Call) -> Value:
    """Along the axis: intersect and shift the intervals; nothing is sent."""
    x = c.x
    dim, n = c["dim"] % x.ndim, x.shape[c["dim"]]
    start, stop, step = slice(c["start"], c["end"], c["step"]).indices(n)
    if dim != x.cut.dim:
        return s.emit(c, x.place)
    return cut(s, c, x, start, stop, step)


def cut(s: ShardingInterpreter, c: Call, x: Value, start: int, stop: int, step: int = 1) -> Value:
    """``x[start:stop:step]`` along the sharded dim: intersect and shift, nothing is sent."""
    assert x.place is not None
    stop = max(start, stop)
    if (start, stop, step) == (0, x.shape[x.cut.dim], 1):
        return Value(c.val, x.place, x.node)
    place = x.cut.refined()
    if (place.outer, place.inner) != (1, 1):
        return s.gather_for(c, "cuts a dim in which the sharded axis is only a factor")
    out = place.with_layout(place.layout.slice(start, stop, step))
    runs = s.on_rank(lambda rank: place.layout.runs(rank, start, stop, step))
    return Value(c.val, out, s.take(c, x, runs, place.dim))


def split(s: ShardingInterpreter, c: Call) -> tuple[Value, ...]:
    """Slices."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.place)
    sizes = [v.shape[dim] for v in c.val]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        s.call(c, aten.slice.Tensor, x, dim, a, a + n, 1)
        for a, n in zip(starts, sizes, strict=True)
    )


def unbind(s: ShardingInterpreter, c: Call) -> tuple[Value, ...]:
    """Selections, or the place moves with its dim."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.cut.at(x.cut.dim - (dim < x.cut.dim)))
    return tuple(s.call(c, aten.select.int, x, dim, i) for i in range(x.shape[dim]))


def select(s: ShardingInterpreter, c: Call) -> Value:
    """The owner broadcasts its row."""
    x = c.x
    dim, n = c["dim"] % x.ndim, x.shape[c["dim"]]
    if dim != x.cut.dim:
        return s.emit(c, x.cut.at(x.cut.dim - (dim < x.cut.dim)))
    # The owner has one row and the others none: a sum over the rows is the row on its owner, zero
    # elsewhere, and the all-reduce is a broadcast whose backward reaches the owner alone.
    index = c["index"] % n
    row = s.call(c, aten.slice.Tensor, x, dim, index, index + 1, 1)
    if not differentiable(row.val):
        return s.call(c, aten.select.int, s.gather(row, "one row is needed by all"), dim, 0)
    return s.call(c, aten.sum.dim_IntList, row, [dim], False)


def cat(s: ShardingInterpreter, c: Call) -> Value:
    """Intervals are joined; a whole operand is first cut, for free."""
    tensors = [t for t in c["tensors"] if t.shape != (0,)]
    dim = c["dim"] % c.val.ndim
    if len(tensors) == 1 and tensors[0].place and tensors[0].val.dtype == c.val.dtype:
        return Value(c.val, tensors[0].place, tensors[0].node)
    place = next((t.place for t in tensors if t.place), None)
    if place is None:  # only an old-style empty operand is sharded, and it does not count
        return s.emit(c, None, enter=False, tensors=tensors)
    if place.dim != dim:
        return s.emit(c, place, tensors=[s.at(t, place) for t in tensors])
    pieces = [piece(s, t, dim, place) for t in tensors]
    layouts = [p.cut.layout for p in pieces if p and p.place]
    if len(layouts) < len(pieces):
        return s.gather_for(c, "joins along a dim in which the sharded axis is only a factor")
    return s.emit(c, Place(Layout.concat(layouts), dim, mesh_axis=place.mesh_axis), tensors=pieces)


def piece(s: ShardingInterpreter, t: Value, dim: int, like: Place) -> Value | None:
    """One operand of a cat along the axis; a whole one is first cut in p, for free."""
    if t.place is None:
        even = Layout.even(t.shape[dim], like.layout.p)
        return s.at(t, Place(even, dim, mesh_axis=like.mesh_axis))
    if t.cut.dim != dim:
        return piece(s, s.gather_aloud(t, "is joined along another dim"), dim, like)
    place = t.cut.refined()
    return Value(t.val, place, t.node) if (place.outer, place.inner) == (1, 1) else None


def stack(s: ShardingInterpreter, c: Call) -> Value:
    """A cat of unsqueezed operands."""
    lifted = [s.call(c, aten.unsqueeze.default, t, c["dim"] % c.val.ndim) for t in c["tensors"]]
    return s.call(c, aten.cat.default, lifted, c["dim"] % c.val.ndim)


def pad(s: ShardingInterpreter, c: Call) -> Value:
    """A cat of constants, or of slices of x, before and behind it."""
    x, value = c.x, c["value"] or 0
    if c.bound.get("mode", "constant") != "constant":
        return padded_by_itself(s, c)
    before, after = pads(c["pad"], x.ndim)[x.cut.dim]
    if (before, after) == (0, 0):
        return s.emit(c, x.place)
    dim = x.cut.dim
    inside = list(c["pad"])
    inside[2 * (x.ndim - 1 - dim) : 2 * (x.ndim - dim)] = [0, 0]
    if any(inside):
        x = s.call(c, aten.constant_pad_nd.default, x, inside, value)
    if min(before, after) < 0:
        stop = x.shape[dim] + min(after, 0)
        x = s.call(c, aten.slice.Tensor, x, dim, max(-before, 0), stop, 1)
    shapes = [[*x.shape[:dim], max(n, 0), *x.shape[dim + 1 :]] for n in (before, after)]
    ends = [s.call(c, aten.new_full.default, x, shape, value) for shape in shapes]
    parts = [t for t in (ends[0], x, ends[1]) if t.shape[dim]] or [x]
    return s.call(c, aten.cat.default, parts, dim)


def padded_by_itself(s: ShardingInterpreter, c: Call) -> Value:
    """reflect, replicate and circular."""
    x = c.x
    sizes = pads(c["pad"], x.ndim)
    if min(min(pair) for pair in sizes) < 0:
        return s.gather_for(c, "takes away and pads by itself")
    for dim, (before, after) in enumerate(sizes):
        ends = [end(s, c, x, dim, k, first) for k, first in ((before, True), (after, False)) if k]
        parts = [*ends[: before > 0], x, *ends[before > 0 :]]
        x = s.call(c, aten.cat.default, parts, dim) if ends else x
    return x


def end(s: ShardingInterpreter, c: Call, x: Value, dim: int, k: int, first: bool) -> Value:
    """The k rows that stand before (or behind) x when it is padded by itself."""
    n, mode = x.shape[dim], c["mode"]
    if mode == "circular":
        return s.call(c, aten.slice.Tensor, x, dim, *((n - k, n) if first else (0, k)), 1)
    if mode == "reflect":
        part = (1, k + 1) if first else (n - k - 1, n - 1)
        return s.call(c, aten.flip.default, s.call(c, aten.slice.Tensor, x, dim, *part, 1), [dim])
    row = s.call(c, aten.slice.Tensor, x, dim, *((0, 1) if first else (n - 1, n)), 1)
    return s.call(c, aten.repeat_interleave.self_int, row, k, dim)


def pads(flat: list[int], ndim: int) -> list[tuple[int, int]]:
    """F.pad's flat list (last dim first) as (before, after) of every dim."""
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return [*[(0, 0)] * (ndim - len(pairs)), *reversed(pairs)]


def roll(s: ShardingInterpreter, c: Call) -> Value:
    """A cat of two slices."""
    x = c.x
    if not c["dims"]:
        return s.gather_for(c, "rolls the flattened tensor")
    for shift, d in zip(c["shifts"], c["dims"], strict=True):
        dim, n = d % x.ndim, x.shape[d]
        first = n - shift % n if n else 0
        parts = [s.call(c, aten.slice.Tensor, x, dim, a, b, 1) for a, b in ((first, n), (0, first))]
        x = s.call(c, aten.cat.default, [t for t in parts if t.shape[dim]] or parts[:1], dim)
    return x


def flip(s: ShardingInterpreter, c: Call) -> Value:
    """Every rank flips what it holds: the same intervals, counted from the other end."""
    place = c.x.cut
    if place.dim not in {d % c.val.ndim for d in c["dims"]}:
        return s.emit(c, place)
    return s.emit(c, place.with_layout(place.layout.reversed))


def as_complex(s: ShardingInterpreter, c: Call) -> Value:
    """The place stays; the last dim holds the two parts of a number."""
    x = c.x
    return (
        s.gather_for(c, "joins the axis to numbers")
        if x.cut.dim == c.val.ndim
        else s.emit(c, x.place)
    )


def same_place(s: ShardingInterpreter, c: Call) -> Value:
    """The place stays."""
    return s.emit(c, c.x.place)


def slice_scatter(s: ShardingInterpreter, c: Call) -> Value:
    """A cat of the parts before, the source and the parts behind."""
    x, src = c.x, c["src"]
    dim, n = c["dim"] % x.ndim, x.shape[c["dim"]]
    start, stop, step = slice(c["start"], c["end"], c["step"]).indices(n)
    stop = max(start, stop)  # 16:2 is empty, and stands at 16
    place = x.place or src.place
    if place.dim != dim:
        return s.emit(c, place, self=s.at(x, place), src=s.at(src, place))
    if step != 1:
        return s.gather_for(c, "writes every other element of the axis")
    parts = [
        s.call(c, aten.slice.Tensor, x, dim, 0, start, 1),
        src,
        s.call(c, aten.slice.Tensor, x, dim, stop, n, 1),
    ]
    return s.call(c, aten.cat.default, [t for t in parts if t.shape[dim]], dim)


def select_scatter(s: ShardingInterpreter, c: Call) -> Value:
    """Where the global position is the index."""
    x, src = c.x, c["src"]
    dim = c["dim"] % x.ndim
    row = s.call(c, aten.unsqueeze.default, src, dim)
    start = c["index"] % x.shape[dim]
    if x.place is not None and x.cut.dim == dim:
        here = s.positions(c, x.place)
        here = s.call(c, aten.view.default, here, [-1 if d == dim else 1 for d in range(x.ndim)])
        mine = s.call(c, aten.eq.Scalar, here, start)
        return s.call(c, aten.where.self, mine, row, x)
    return s.call(c, aten.slice_scatter.default, x, row, dim, start, start + 1, 1)
