"""Ops that refuse a shard without rows: it gets one of zeros, and what comes of that is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mosaic.layout import Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten


def spare_row(s: ShardingInterpreter, c: Call, x: Value, place: Place) -> fx.Node:
    """This rank's rows of ``x``, which is at ``place``, and one of zeros behind them."""
    assert s.emitter
    pads = [0, 0] * (x.ndim - 1 - place.dim) + [0, 1]
    return s.emitter.op(c.like, aten.constant_pad_nd.default, (s.node(x), pads, 0), {})


def not_empty(s: ShardingInterpreter, c: Call, x: Value, place: Place) -> Value:
    """``x`` as it is, or with a spare row where this rank has none."""
    if not s.emitter or place.local_size(s.emitter.rank):
        return x
    return Value(x.val, x.place, spare_row(s, c, x, place))


def rows_of(s: ShardingInterpreter, c: Call, value: Value, place: Place) -> Value:
    """``value`` without what its spare rows have become."""
    if not s.emitter:
        return Value(value.val, place)
    cut = (value.node, place.dim, 0, place.local_size(s.emitter.rank))
    return Value(value.val, place, s.emitter.op(c.like, aten.slice.Tensor, cut, {}))


def emit(s: ShardingInterpreter, c: Call, place: Place, name: str = "self", **changed: Any) -> Any:
    """``s.emit`` of an op that refuses an empty operand ``name``."""
    x = c[name]
    if not s.emitter or x.cut.local_size(s.emitter.rank):
        return s.emit(c, place, **changed)
    out = s.emit(c, place, **{**changed, name: not_empty(s, c, x, x.place)})
    if isinstance(out, tuple):
        return tuple(rows_of(s, c, v, place) for v in out)
    return rows_of(s, c, out, place)
