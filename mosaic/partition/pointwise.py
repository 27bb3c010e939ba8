"""The one rule that all pointwise ops share."""

from __future__ import annotations

from typing import Any

from mosaic.layout import Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value, map_values


def pointwise(s: ShardingInterpreter, c: Call) -> Any:
    """All operands meet at one place; whole ones are hoisted there, other layouts resharded."""
    ndim = result(c).ndim
    place = meeting(s, c, ndim)
    if place is None:  # every sharded operand has length 1 there and is broadcast: make them whole
        whole = map_values(lambda v: s.gather(v, "a length of 1 is broadcast", c.like), c.bound)
        return s.emit(c, None, enter=False, **whole)
    changed = map_values(lambda v: aligned(s, v, place, ndim), c.bound)
    return s.emit(c, place, **changed)


def result(c: Call) -> Any:
    return c.val[0] if isinstance(c.val, (tuple, list)) else c.val


def meeting(s: ShardingInterpreter, c: Call, ndim: int) -> Place | None:
    """The place of the largest sharded operand that is not broadcast, the base layout first."""
    shape = result(c).shape
    places = [(v.cut.at(v.cut.dim + ndim - v.ndim), v.val.numel()) for v in c.tensors() if v.place]
    fitting = [(pl, n) for pl, n in places if pl.size == shape[pl.dim]]
    if not fitting:
        return None
    return max(fitting, key=lambda x: (x[0].layout == s.axis.layout, x[1]))[0]


def aligned(s: ShardingInterpreter, v: Value, place: Place, ndim: int) -> Value:
    dim = place.dim - (ndim - v.ndim)
    if dim < 0 or v.shape[dim] != place.size:
        return s.gather_aloud(v, "is broadcast along the axis")
    return s.at(v, place.at(dim))
