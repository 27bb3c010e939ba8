"""Recurrences along the axis: each stretch by itself, one all-gather of states, then they are read.

However long the axis is, what is sent of a stretch is its last state and what becomes of any state
before it: for a gated delta rule (k_dim, v_dim) and (k_dim, k_dim) for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from mosaic.layout import Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.scans import runs_of
from mosaic.partition.values import Call, Value, map_values
from mosaic.recurrences import segments
from mosaic.recurrences.call import Recurrence
from mosaic.recurrences.segments import widened


def recurrence(s: ShardingInterpreter, c: Call) -> tuple[Value, ...]:
    """Batches are free; along its rows ranks exchange states."""
    known = Recurrence.decode(c["call"])
    given = dict(zip(known.tensors, c["tensors"], strict=True))
    rows = {name: dim for name, dim in known.kind.rows.items() if name in given}
    batched = {name: 0 for name in (known.kind.state,) if name in given} | rows
    cut = {name: given[name].cut.refined() for name in batched if given[name].place}
    name, place = next(reversed(cut.items()), ("", None))  # of rows, if any are cut
    if place is None or place.dim not in (0, batched[name]) or (place.outer, place.inner) != (1, 1):
        if any(x.place for x in given.values()):
            c = s.with_whole_operands(c, "is cut in another dim than its rows")
        return run(s, c, c["tensors"], (None, None))
    if place.dim == 0:
        tensors = [s.at(x, place) if n in batched else whole(s, c, x) for n, x in given.items()]
        return run(s, c, tensors, (place, place))
    tensors = [
        s.at(x, place.at(rows[n])) if n in rows else whole(s, c, x) for n, x in given.items()
    ]
    s.recurrences.append(c.like)
    out = place.at(known.kind.out)
    if s.axis.p == 1:
        return run(s, c, tensors, (out, None))
    return along_axis(s, c, dict(zip(given, tensors, strict=True)), out)


def whole(s: ShardingInterpreter, c: Call, x: Value) -> Value:
    return s.gather_aloud(x, "is needed for every row", c.like)


def run(
    s: ShardingInterpreter, c: Call, tensors: list[Value], places: tuple[Place | None, ...]
) -> tuple[Value, ...]:
    """As the user calls it."""
    results = tuple(zip(c.val, places, strict=True))
    return written(s, c, segments.run_whole, (c["call"], *tensors), *results, enter=any(places))


def along_axis(
    s: ShardingInterpreter, c: Call, given: dict[str, Value], place: Place
) -> tuple[Value, ...]:
    """Each rank's stretches, and what is before them."""
    (out, last), call, kind = c.val, c["call"], Recurrence.decode(c["call"]).kind
    pieces = Place(place.layout.pieces, 0, mesh_axis=place.mesh_axis)
    runs = runs_of(s, place) if s.emitter else []
    shape = list(last.shape)
    sent = widened(last).new_empty([pieces.size, prod(shape) + prod(kind.along_shape(shape))])
    tensors = [None if name == kind.state else x for name, x in given.items()]
    own, reading, mine = written(
        s, c, segments.answered, (call, runs, *tensors),
        (out, place), (out, place.at(kind.reading)), (sent, pieces),
    )  # fmt: skip
    every = s.gather(mine, "states of a recurrence, of each stretch of rows", c.like)
    before, final = written(
        s, c, segments.states, (call, every, shape, last.dtype, given.get(kind.state)),
        (sent[:, : prod(shape)], None), (last, None), enter=False,
    )  # fmt: skip
    before = s.at(before, pieces)
    result = written(
        s, c, segments.read, (call, runs, own, reading, before, shape, out.dtype), (out, place)
    )
    return *result, final


def written(
    s: ShardingInterpreter, c: Call, function: Callable[..., Any], args: tuple[Any, ...],
    *results: tuple[torch.Tensor, Place | None], enter: bool = True,
) -> tuple[Value, ...]:  # fmt: skip
    """A call of ours in the local program, through which autograd goes. ``results``: what it gives,
    at global size, and where. ``enter``: whole operands are used by sharded work."""
    if not s.emitter:
        return tuple(Value(val, place) for val, place in results)
    node = s.emitter.op(c.like, function, map_values(lambda v: s.operand(v, enter), args), {})
    several = len(results) > 1
    nodes = [s.emitter.item(node, i) for i in range(len(results))] if several else [node]
    return tuple(Value(*result, n) for result, n in zip(results, nodes, strict=True))
