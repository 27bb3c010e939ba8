"""Lookups by index, and triangles (which depend on positions)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaic.layout import Layout, Place, Shard, held_rows_of
from mosaic.partition.empty import not_empty
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
ELSEWHERE = "is looked up by positions of other ranks"


def index(s: ShardingInterpreter, c: Call) -> Value:
    """``x[i, j]``: an axis of the indices is free, and so is a dim of x that is not indexed. What
    is looked up along the axis itself is asked of all ranks if it is little, else cut anew."""
    x, indices = c.x, list(c["indices"])
    at = [d for d, i in enumerate(indices) if i is not None]
    lookups = [indices[d] for d in at]
    if any(v.val.dtype == torch.bool for v in lookups):
        return s.gather_for(c, "selects by a mask, whose count depends on the data")
    rank, first = index_dims(indices)
    sharded = next((v for v in lookups if v.place), None)
    if sharded is not None:
        place = sharded.cut.at(sharded.cut.dim + rank - sharded.ndim)
        if c.val.shape[first + place.dim] != place.size:
            return s.gather_for(c, "broadcasts the axis of an index")
        return indexed_at(s, c, place, first, rank)
    if x.cut.dim not in at:
        return s.emit(c, x.cut.at(after_index(x.cut.dim, indices)))
    shape = c.val.shape[first : first + rank]
    if s.has_recipes(c) or not shape.numel():
        return s.gather_for(c, "looks up positions of other ranks")
    if is_little(x.cut, shape.numel()):
        return index_asked(s, c, c.val.ndim - first - rank)
    dim = max(range(rank), key=lambda d: shape[d])
    return indexed_at(s, c, cut_anew(s, x.cut, shape[dim], dim), first, rank)


def index_dims(indices: list[Value | None]) -> tuple[int, int]:
    """How many dims the broadcast indices have, and the first of them in the result."""
    at = [d for d, i in enumerate(indices) if i is not None]
    adjacent = at == list(range(at[0], at[0] + len(at)))
    return max(i.ndim for i in indices if i is not None), at[0] if adjacent else 0


def after_index(dim: int, indices: list[Value | None]) -> int:
    """Where a dim of x that is not indexed is in ``x[indices]``."""
    rank, first = index_dims(indices)
    left = dim - sum(i is not None for i in indices[:dim])
    return left + (rank if first <= left else 0)


def indexed_at(s: ShardingInterpreter, c: Call, place: Place, first: int, rank: int) -> Value:
    """The result's part at ``place`` (a dim of the indices), of the whole of what is indexed."""
    new = [i and along(s, i, place, rank) for i in c["indices"]]
    whole = s.gather_aloud(c.x, ELSEWHERE, c.like)
    return s.emit(c, place.at(first + place.dim), self=whole, indices=new)


def along(s: ShardingInterpreter, v: Value, place: Place, rank: int) -> Value:
    dim = place.dim - (rank - v.ndim)
    if dim < 0 or v.shape[dim] != place.size:
        return s.gather_aloud(v, "is broadcast against a sharded index")
    return s.at(v, place.at(dim))


# --- lookups along the axis itself ----------------------------------------------------------


def is_little(place: Place, rows: int) -> bool:
    """Whether so many rows are no more than what a rank holds: then every rank may have them."""
    return rows * place.layout.p <= place.size


def cut_anew(s: ShardingInterpreter, place: Place, n: int, dim: int) -> Place:
    """How a new dim of length n is cut: as the axis, where it is as long."""
    layout = s.axis.layout if n == s.axis.layout.n else Layout.even(n, place.layout.p)
    return Place(layout, dim, mesh_axis=place.mesh_axis)


def index_asked(s: ShardingInterpreter, c: Call, behind: int) -> Value:
    """Each rank looks up the rows that it holds, zeros elsewhere; the sum is what was asked for."""
    place = c.x.cut
    rows = c["indices"][place.dim]
    new = list(c["indices"])
    new[place.dim] = rows_here(s, c, rows, place, spare=0)
    held = held_here(s, c, rows, place)
    held = s.call(c, aten.reshape.default, held, [*rows.shape, *[1] * behind])
    return asked(s, c, held, self=not_empty(s, c, c.x, place), indices=new)


def asked(s: ShardingInterpreter, c: Call, held: Value, **changed: Any) -> Value:
    found = s.emit(c, None, **changed)
    found = s.call(c, aten.where.self, held, found, s.call(c, aten.zeros_like.default, found))
    return s.sum_across(found, c, "rows that are looked up, each from its owner")


def rows_here(
    s: ShardingInterpreter, c: Call, rows: Value, place: Place, spare: int | None
) -> Value:
    """Global indices as those of this rank's memory; ``spare`` (None: one behind the last) where
    another rank holds them."""
    rows = s.gather(rows, "an index that all ranks need", c.like)
    return s.function(c, local_rows, (rows, encoded(s, place), spare), rows.val)


def held_here(s: ShardingInterpreter, c: Call, rows: Value, place: Place) -> Value:
    """Which of these global indices this rank holds."""
    return s.function(c, held_rows, (rows, encoded(s, place)), rows.val.bool())


def encoded(s: ShardingInterpreter, place: Place) -> str:
    return s.emitter.shard(place.at(0)) if s.emitter else ""


def local_rows(rows: Tensor, spec: str, spare: int | None) -> Tensor:
    """Indices that no rank has are an error here as on one device: they stay outside, and one step
    further, past a spare row behind all others."""
    shard = Shard.decode(spec)
    n, size = shard.place.size, shard.place.local_size(shard.rank)
    from_start = torch.where(rows < 0, rows + n, rows)
    outside = torch.where(rows < 0, rows - 1, rows + 1)
    here = torch.where(held_of(from_start, 0, n), size if spare is None else spare, outside)
    for start, stop, first in held_rows_of(shard):
        here = torch.where(held_of(from_start, start, stop), from_start - start + first, here)
    return here


def held_rows(rows: Tensor, spec: str) -> Tensor:
    """Which of these global indices this rank holds."""
    shard = Shard.decode(spec)
    from_start = torch.where(rows < 0, rows + shard.place.size, rows)
    held = torch.zeros_like(rows, dtype=torch.bool)
    for start, stop, _ in held_rows_of(shard):
        held = held | held_of(from_start, start, stop)
    return held


def held_of(rows: Tensor, start: int, stop: int) -> Tensor:
    return (rows >= start) & (rows < stop)


def index_select(s: ShardingInterpreter, c: Call) -> Value:
    """The axis of the index is free, and so are dims that are not selected from."""
    x, dim, rows = c.x, c["dim"] % c.x.ndim, c["index"]
    if rows.place is not None:
        return s.emit(c, rows.cut.at(dim), self=s.gather_aloud(x, ELSEWHERE, c.like))
    if x.cut.dim != dim:
        return s.emit(c, x.place)
    lookup = [rows if d == dim else None for d in range(x.ndim)]
    return s.call(c, aten.index.Tensor, x, lookup)


def gather(s: ShardingInterpreter, c: Call) -> Value:
    """Every dim but the one that is looked up along is free; along it as ``index``."""
    x, where, dim = c.x, c["index"], c["dim"] % c.x.ndim
    place: Place = where.place or x.cut
    if place.dim != dim:
        if x.shape[place.dim] != where.shape[place.dim]:
            return s.gather_for(c, "reads only a part of the axis")
        return s.emit(c, place, self=s.at(x, place), index=s.at(where, place))
    if where.place is None and (s.has_recipes(c) or not where.val.numel()):
        return s.gather_for(c, "looks up positions of other ranks")
    if where.place is None and is_little(place, where.shape[dim]):
        return gather_asked(s, c)
    there = where.place or cut_anew(s, place, where.shape[dim], dim)
    whole = s.gather_aloud(x, ELSEWHERE, c.like)
    return s.emit(c, there, self=whole, index=s.at(where, there))


def gather_asked(s: ShardingInterpreter, c: Call) -> Value:
    """``gather`` along the axis by indices that are whole: asked of the rows' owners."""
    place, where = c.x.cut, c["index"]
    rows = rows_here(s, c, where, place, spare=0)
    held = held_here(s, c, where, place)
    return asked(s, c, held, self=not_empty(s, c, c.x, place), index=rows)


def triangle(s: ShardingInterpreter, c: Call) -> Value:
    """tril and triu by global positions: a shard's own diagonal lies elsewhere."""
    x = c.x
    rows, cols = x.ndim - 2, x.ndim - 1
    if x.cut.dim < rows:
        return s.emit(c, x.place)
    other = cols if x.cut.dim == rows else rows
    mine = s.positions(c, x.cut)
    rest = s.call(c, aten.arange.default, x.shape[other], device=x.val.device)
    i, j = (mine, rest) if other == cols else (rest, mine)
    j, i = s.call(c, aten.unsqueeze.default, j, 0), s.call(c, aten.unsqueeze.default, i, 1)
    apart = s.call(c, aten.sub.Tensor, j, i)
    compare = aten.le.Scalar if "tril" in c.name else aten.ge.Scalar
    keep = s.call(c, compare, apart, c["diagonal"])
    return s.call(c, aten.where.self, keep, x, s.call(c, aten.zeros_like.default, x))
