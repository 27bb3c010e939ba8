"""Lookups by index, and triangles (which depend on positions)."""

from __future__ import annotations

import torch

from mosaic.sharder import Sharder
from mosaic.values import Call, Value

aten = torch.ops.aten


def index(s: Sharder, c: Call) -> Value:
    """``x[i, j]``: an axis of the indices is free, and so is a dim of x that is not indexed."""
    x, indices = c["self"], list(c["indices"])
    at = [d for d, i in enumerate(indices) if i is not None]
    lookups = [indices[d] for d in at]
    rank = max(v.ndim for v in lookups)
    adjacent = at == list(range(at[0], at[0] + len(at)))
    first = at[0] if adjacent else 0
    sharded = next((v for v in lookups if v.place), None)
    if any(v.val.dtype == torch.bool for v in lookups):
        return s.gather_for(c, "selects by a mask, whose count depends on the data")
    if sharded is not None:
        place = sharded.place.at(sharded.place.dim + rank - sharded.ndim)
        size = c.val.shape[first + place.dim]
        if size != place.size:
            return s.gather_for(c, "broadcasts the axis of an index")
        moved = [along(s, v, place, rank, size) for v in lookups]
        new = [moved[at.index(d)] if i is not None else None for d, i in enumerate(indices)]
        whole = s.gather_aloud(x, "is looked up by positions of other ranks", c.like)
        return s.emit(c, place.at(first + place.dim), self=whole, indices=new)
    if x.place.dim in at:
        return s.gather_for(c, "looks up positions of other ranks")
    before = sum(d < x.place.dim for d in at)
    dim = x.place.dim - before + (rank if first <= x.place.dim else 0)
    return s.emit(c, x.place.at(dim))


def along(s: Sharder, v: Value, place, rank: int, size: int) -> Value:
    dim = place.dim - (rank - v.ndim)
    if dim < 0 or v.shape[dim] != size:
        return s.gather_aloud(v, "is broadcast against a sharded index")
    return s.at(v, place.at(dim))


def index_select(s: Sharder, c: Call) -> Value:
    """The axis of the index is free, and so are dims that are not selected from."""
    x, dim = c["self"], c["dim"] % c["self"].ndim
    if c["index"].place is not None:
        whole = s.gather_aloud(x, "is looked up by positions of other ranks", c.like)
        return s.emit(c, c["index"].place.at(dim), self=whole)
    if x.place.dim == dim:
        return s.gather_for(c, "looks up positions of other ranks")
    return s.emit(c, x.place)


def gather(s: Sharder, c: Call) -> Value:
    """Every dim but the one that is looked up along is free."""
    x, where, dim = c["self"], c["index"], c["dim"] % c["self"].ndim
    place = where.place or x.place
    if place.dim == dim:
        if x.place is None:
            return s.emit(c, place)
        return s.gather_for(c, "looks up positions of other ranks")
    if x.shape[place.dim] != where.shape[place.dim]:
        return s.gather_for(c, "reads only a part of the axis")
    return s.emit(c, place, self=s.at(x, place), index=s.at(where, place))


def triangle(s: Sharder, c: Call) -> Value:
    """tril and triu by global positions: a shard's own diagonal lies elsewhere."""
    x = c["self"]
    rows, cols = x.ndim - 2, x.ndim - 1
    if x.place.dim < rows:
        return s.emit(c, x.place)
    other = cols if x.place.dim == rows else rows
    mine = s.positions(c, x.place)
    rest = s.call(c, aten.arange.default, x.shape[other], device=x.val.device)
    i, j = (mine, rest) if other == cols else (rest, mine)
    j, i = s.call(c, aten.unsqueeze.default, j, 0), s.call(c, aten.unsqueeze.default, i, 1)
    apart = s.call(c, aten.sub.Tensor, j, i)
    compare = aten.le.Scalar if "tril" in c.name else aten.ge.Scalar
    keep = s.call(c, compare, apart, c["diagonal"])
    return s.call(c, aten.where.self, keep, x, s.call(c, aten.zeros_like.default, x))
