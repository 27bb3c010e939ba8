"""Writes by index. Free along every dim that is not written along; along the axis itself a rank
writes the rows that it holds, and the others into a spare row that is dropped."""

from __future__ import annotations

from typing import Any

import torch

from mosaic.layout import Place
from mosaic.partition import masked_writes
from mosaic.partition.empty import rows_of, spare_row
from mosaic.partition.indexing import after_index, index_dims, rows_here
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.pointwise import aligned
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
OF_OTHERS = "writes to positions of other ranks"
SUMS = ("index_add", "scatter_add")  # what cut operands add to a whole meets in a sum


def index_put(s: ShardingInterpreter, c: Call) -> Value:
    """``x[i, j] = values``."""
    indices, values = list(c["indices"]), c["values"]
    lookups = [i for i in indices if i is not None]
    if any(i.val.dtype == torch.bool for i in lookups):
        if len(lookups) > 1:
            return s.gather_for(c, "writes by a mask, whose count depends on the data")
        return masked_writes.put(s, c, indices)
    if any(i.place for i in lookups):
        return put_cut(s, c)
    x = c.x
    place = x.place or values_place(x, values, indices)
    if place is None:
        return s.gather_for(c, OF_OTHERS)
    x = s.at(x, place)
    if place.dim not in [d for d, i in enumerate(indices) if i is not None]:
        written = len(x.shape) - len(lookups) + index_dims(indices)[0]
        there = place.at(after_index(place.dim, indices))
        return s.emit(c, place, self=x, values=aligned(s, values, there, written))
    if values.place is not None:
        return s.gather_for(c, OF_OTHERS)
    indices[place.dim] = rows_here(s, c, indices[place.dim], place, spare=None)
    return spared(s, c, x, place, indices=indices)


def put_cut(s: ShardingInterpreter, c: Call) -> Value:
    """Cut indices: what they add to a whole x meets in a sum."""
    if not c["accumulate"] or c.x.place is not None:
        return s.gather_for(c, OF_OTHERS)
    indices = list(c["indices"])
    rank, first = index_dims(indices)
    cut = next(i for i in indices if i is not None and i.place)
    place = cut.cut.at(cut.cut.dim + rank - cut.ndim)
    shape = torch.broadcast_shapes(*(i.shape for i in indices if i is not None))
    if shape[place.dim] != place.size:
        return s.gather_for(c, "broadcasts the axis of an index")
    written = c.x.ndim - sum(i is not None for i in indices) + rank
    new = [i and aligned(s, i, place, rank) for i in indices]
    values = aligned(s, c["values"], place.at(first + place.dim), written)
    return added(s, c, indices=new, values=values)


def values_place(x: Value, values: Value, indices: list[Value | None]) -> Place | None:
    """Where x is cut if its new values are; None where they are cut along what is indexed."""
    written = x.ndim - sum(i is not None for i in indices) + index_dims(indices)[0]
    assert values.place is not None
    there = values.cut.dim + written - values.ndim
    for dim in range(x.ndim):
        free = dim >= len(indices) or indices[dim] is None
        if free and after_index(dim, indices) == there and x.shape[dim] == values.cut.size:
            return values.cut.at(dim)
    return None


def spared(s: ShardingInterpreter, c: Call, x: Value, place: Place, **changed: Any) -> Value:
    """Write into this rank's rows and a spare one, and drop that."""
    if not s.emitter:
        return Value(c.val, place)
    longer = Value(x.val, place, spare_row(s, c, x, place))
    return rows_of(s, c, s.emit(c, place, self=longer, **changed), place)


def added(s: ShardingInterpreter, c: Call, **changed: Any) -> Value:
    """A whole self with the sum of what every rank adds to it."""
    zeros = s.call(c, aten.zeros_like.default, c.x)
    part = s.emit(c, None, self=zeros, **changed)
    total = s.sum_across(part, c, "what every rank adds to a whole")
    return s.call(c, aten.add.Tensor, c.x, total)


def index_write(s: ShardingInterpreter, c: Call) -> Value:
    """index_add, index_copy and index_fill: rows of one dim."""
    x, source, dim = c.x, c.bound.get("source"), c["dim"] % c.x.ndim
    place = x.place or (source.place if source else None)
    if c["index"].place is not None or (x.place is None and place is not None and place.dim == dim):
        return index_added(s, c, x, source, dim)
    assert place is not None
    if place.dim != dim:
        new: dict[str, Any] = {} if source is None else {"source": s.at(source, place)}
        return s.emit(c, place, self=s.at(x, place), **new)
    if source is not None and source.place is not None:
        return s.gather_for(c, OF_OTHERS)
    return spared(s, c, x, place, index=rows_here(s, c, c["index"], place, spare=None))


def index_added(s: ShardingInterpreter, c: Call, x: Value, source: Value | None, dim: int) -> Value:
    """Cut rows that are added to a whole."""
    place = (source.place if source else None) or c["index"].cut.at(dim)
    if x.place is not None or source is None or place.dim != dim or name_of(c) not in SUMS:
        return s.gather_for(c, OF_OTHERS)
    return added(s, c, index=s.at(c["index"], place.at(0)), source=s.at(source, place))


def scatter(s: ShardingInterpreter, c: Call) -> Value:
    """scatter, scatter_add and scatter_reduce."""
    x, dim = c.x, c["dim"] % c.x.ndim
    given: dict[str, Any] = {n: c[n] for n in ("index", "src") if isinstance(c.bound.get(n), Value)}
    place = x.place or next(v.place for v in given.values() if v.place)
    if place.dim != dim:
        if any(v.shape[place.dim] != place.size for v in (x, *given.values())):
            return s.gather_for(c, "writes to only a part of the axis")
        there: dict[str, Any] = {n: s.at(v, place) for n, v in given.items()}
        return s.emit(c, place, self=s.at(x, place), **there)
    if x.place is None:
        return scatter_added(s, c, given, place)
    if any(v.place for v in given.values()) or "reduce" in c.bound:
        return s.gather_for(c, OF_OTHERS)
    return spared(s, c, x, place, index=rows_here(s, c, c["index"], place, spare=None))


def scatter_added(s: ShardingInterpreter, c: Call, given: dict[str, Any], place: Place) -> Value:
    """Cut elements that are added to a whole."""
    sizes = {v.shape[place.dim] for v in given.values()}
    if name_of(c) not in SUMS or sizes != {place.size}:
        return s.gather_for(c, OF_OTHERS)
    return added(s, c, **{n: s.at(v, place) for n, v in given.items()})


def name_of(c: Call) -> str:
    return c.target._schema.name.removeprefix("aten::")
