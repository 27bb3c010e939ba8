"""Running sums and products along the axis, and the place of the largest value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mosaic.layout import Place, placed
from mosaic.partition.indexing import gather_asked
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.reductions import along, cast, extreme_value, kept
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
JOINED = {
    "cumsum": (aten.add.Tensor, 0),
    "cumprod": (aten.mul.Tensor, 1),
    "logcumsumexp": (aten.logaddexp.default, -float("inf")),
}


def scan(s: ShardingInterpreter, c: Call) -> Value:
    """Along the axis: a scan of every interval, joined with the scan of all intervals before it."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.place)
    place = x.cut.refined()
    if s.has_recipes(c) or (place.outer, place.inner) != (1, 1):
        return s.gather_for(c, "works along the axis")
    if x.val.dtype != wide(c.val.dtype):
        x = s.call(c, aten._to_copy.default, x, dtype=wide(c.val.dtype))
    join, nothing = JOINED[c.name.removeprefix("aten.")]
    pieces = place.with_layout(place.layout.pieces)
    inside, last = each_interval(s, c, x, place, pieces)
    every = s.gather(last, "what all parts of the axis come to", c.like)
    every = s.call(c, c.target, every, dim)
    first = s.call(
        c, aten.full_like.default, s.call(c, aten.slice.Tensor, every, dim, 0, 1), nothing
    )
    before = [first, s.call(c, aten.slice.Tensor, every, dim, 0, every.shape[dim] - 1)]
    mine = s.at(s.call(c, aten.cat.default, before, dim), pieces)
    return cast(s, c, s.call(c, join, inside, repeated(s, c, mine, place)))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a scan is computed in, so that its parts are not rounded before they are joined."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.int64
    return torch.float32 if dtype.itemsize == 2 else dtype


def each_interval(
    s: ShardingInterpreter, c: Call, x: Value, place: Place, pieces: Place
) -> tuple[Value, Value]:
    """The scan of every interval of this rank by itself, and the last element of each."""
    dim, shape = place.dim, [*x.shape]
    shape[dim] = pieces.size
    ends = x.val.new_empty(shape)
    if not s.emitter:
        return Value(x.val, place), Value(ends, pieces)
    scans, lasts = [], []
    for run in runs_of(s, place) or [(0, 0)]:
        part = write(s, c, aten.slice.Tensor, s.node(x), dim, *run)
        scans.append(write(s, c, c.target, part, dim))
        lasts.append(write(s, c, aten.slice.Tensor, scans[-1], dim, max(0, run[1] - run[0] - 1)))
    inside, last = (joined(s, c, parts, dim) for parts in (scans, lasts))
    return Value(x.val, place, inside), Value(ends, pieces, last)


def repeated(s: ShardingInterpreter, c: Call, value: Value, place: Place) -> Value:
    """One row for each interval of this rank, for all of its elements."""
    if not s.emitter:
        return Value(c.val, place)
    parts, dim = [], place.dim
    for k, (start, stop) in enumerate(runs_of(s, place) or [(0, 0)]):
        row = write(s, c, aten.slice.Tensor, s.node(value), dim, k, k + 1)
        shape = [stop - start if d == dim else n for d, n in enumerate(row.meta["val"].shape)]
        empty = start == stop  # there is no row, and nothing to repeat
        parts.append(row if empty else write(s, c, aten.expand.default, row, shape))
    return Value(c.val, place, joined(s, c, parts, dim))


def runs_of(s: ShardingInterpreter, place: Place) -> list[tuple[int, int]]:
    """Where each interval lies in this rank's memory."""
    assert s.emitter
    held = placed(place.layout.ranks[s.emitter.rank])
    return [(run.start, run.stop) for _, run in held]


def write(s: ShardingInterpreter, c: Call, target: Any, *args: Any) -> fx.Node:
    assert s.emitter
    return s.emitter.op(c.like, target, args, {})


def joined(s: ShardingInterpreter, c: Call, parts: list[fx.Node], dim: int) -> fx.Node:
    return parts[0] if len(parts) == 1 else write(s, c, aten.cat.default, parts, dim)


# --- the place of the largest value -----------------------------------------------------------


def arg_extreme(s: ShardingInterpreter, c: Call) -> Value:
    """argmax and argmin along the axis: the first of the largest of all ranks."""
    x, dim = c.x, c["dim"]
    if dim is not None and dim % x.ndim != x.cut.dim:
        return along(s, c, "dim")
    if s.has_recipes(c):
        return s.gather_for(c, "works along the axis")
    dims = list(range(x.ndim)) if dim is None else [dim % x.ndim]
    found = first_place(s, c, dims)
    return s.call(c, aten.reshape.default, found, list(c.val.shape))


def first_place(s: ShardingInterpreter, c: Call, dims: list[int]) -> Value:
    """The least position of the largest (or smallest) value over some dims, or of the first nan;
    dims are kept."""
    x, largest = c.x, "max" in c.name
    position, count = positions_over(s, c, x, dims)
    best = extreme_value(s, c, x, dims, largest)
    beaten = s.call(c, aten.lt.Tensor if largest else aten.gt.Tensor, x, best)
    later = s.call(c, aten.add.Tensor, position, count)
    rank = s.call(
        c, aten.where.ScalarOther, s.call(c, aten.logical_not.default, beaten), later, 2 * count
    )
    if x.val.is_floating_point():
        rank = s.call(c, aten.where.self, s.call(c, aten.isnan.default, x), position, rank)
    first = extreme_value(s, c, rank, dims, largest=False)
    return s.call(c, aten.remainder.Scalar, first, max(count, 1))


def positions_over(s: ShardingInterpreter, c: Call, x: Value, dims: list[int]) -> tuple[Value, int]:
    """Where each element stands among those of these dims, flattened; and how many there are."""
    position, count = None, 1
    assert x.place is not None
    for dim in reversed(dims):
        if dim == x.cut.dim:
            mine = s.positions(c, x.place)
        else:
            mine = s.call(c, aten.arange.default, x.shape[dim], device=x.val.device)
        mine = s.call(c, aten.view.default, mine, [-1 if d == dim else 1 for d in range(x.ndim)])
        mine = s.call(c, aten.mul.Scalar, mine, count)
        position = mine if position is None else s.call(c, aten.add.Tensor, position, mine)
        count *= x.shape[dim]
    assert position is not None
    return position, count


def extreme_along(s: ShardingInterpreter, c: Call) -> Any:
    """max and min along a dim: the value at the first of the largest of all ranks."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, kept(x.cut, [dim], c["keepdim"]))
    if s.has_recipes(c):
        return s.gather_for(c, "works along the axis")
    where = first_place(s, c, [dim])
    looked_up = Call(aten.gather.default, (x, dim, where), {}, None, c.like)
    looked_up.val = s.global_value(looked_up)
    value = gather_asked(s, looked_up)
    shape = list(c.val[0].shape)
    return tuple(s.call(c, aten.reshape.default, v, shape) for v in (value, where))
