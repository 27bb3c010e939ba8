"""Rules for what writing one axis leaves in the graph: collectives and helpers of ours.

Of several axes each is written over the local program of those before it. There an earlier axis is
a dim like any other, of this rank's length, and all ranks along the later one have that program.
"First" and "second" are here any two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from mosaic.layout import Place, Shard
from mosaic.partition.functions import call_autograd_function
from mosaic.partition.indexing import held_rows, local_rows
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.randomness import keep_mask
from mosaic.partition.reductions import local_extreme, won
from mosaic.partition.values import Value, map_values
from mosaic.partition.views import view
from mosaic.recurrences import segments
from mosaic.runtime import collectives, rng
from mosaic.runtime.comm import broadcast

HelperRule = Callable[[ShardingInterpreter, fx.Node], Any]


def again(
    s: ShardingInterpreter, node: fx.Node, args: tuple[Any, ...], place: Place | None
) -> Value:
    """The same helper on the operands that the second axis has."""
    val = node.meta["val"]
    if not s.emitter:
        return Value(val, place)
    operands = map_values(s.node, args)
    return Value(val, place, s.emitter.function(node, node.target, operands, name=node.name))


def elementwise(s: ShardingInterpreter, node: fx.Node) -> Value:
    """The place stays."""
    x = s.env[node.args[0]]
    return again(s, node, (x, *node.args[1:]), x.place)


def moved(s: ShardingInterpreter, node: fx.Node) -> Value:
    """The first axis is cut, gathered or resharded: free in any other dim than the second's."""
    x = s.env[node.args[0]]
    if x.place.dim == Shard.decode(node.args[1]).place.dim:
        x = s.gather_aloud(x, "is cut in the dim in which the other axis is moved", node)
    return again(s, node, (x, *node.args[1:]), x.place)


def extreme(s: ShardingInterpreter, node: fx.Node) -> Value:
    """The first axis's part of a maximum; over the second axis the parts meet too."""
    x, (dims, largest) = s.env[node.args[0]], node.args[1:]
    if x.cut.dim not in dims:
        return again(s, node, (x, dims, largest), x.place)
    part = again(s, node, (x, dims, largest), None)
    return s.joined(part, node, "largest or smallest over the axis", "max" if largest else "min")


def shared_out(s: ShardingInterpreter, node: fx.Node) -> Value:
    """The gradient of a maximum: as far as the second axis is reduced too, it is whole."""
    x, best, wins, number = (s.env[n] for n in node.args)
    place = next(v.place for v in (x, wins, best, number) if v.place)
    x, wins = s.at(x, place), s.at(wins, place)
    is_kept = best.shape[place.dim] == x.shape[place.dim]
    if is_kept:
        best, number = s.at(best, place), s.at(number, place)
    else:
        best, number = (s.gather(v, "a maximum is whole", node) for v in (best, number))
    return again(s, node, (x, best, wins, number), place if is_kept else None)


def kept(s: ShardingInterpreter, node: fx.Node) -> Value:
    """A dropout mask knows the global indices of both axes."""
    seed, x, site, shards, p = node.args
    value, parts = s.env[x], shards.split(";")
    dim = value.cut.dim
    if Shard.decode(parts[dim]).place.layout.p > 1:
        value = s.gather_aloud(value, "is dropped from in a dim that both axes cut", node)
    elif s.emitter:
        parts[dim] = s.emitter.shard(value.cut.at(0))
    return again(s, node, (s.env[seed], value, site, ";".join(parts), p), value.place)


def drawn(s: ShardingInterpreter, node: fx.Node) -> Value:
    """A seed that the ranks of the first axis share: those of the second share it too."""
    seed = again(s, node, node.args, None)
    if s.emitter and s.axis.p > 1:
        args = (seed.node, s.emitter.group)
        seed.node = s.emitter.function(node, broadcast, args, name=node.name)
    return seed


def run_whole(s: ShardingInterpreter, node: fx.Node, why: str) -> Any:
    """A function of which nothing is known on all of the second axis."""
    whole = [
        s.gather_aloud(s.env[x], why, node) if isinstance(x, fx.Node) else x for x in node.args
    ]
    found, results = again(s, node, tuple(whole), None), node.meta["val"]
    if isinstance(results, torch.Tensor):
        return found
    items = [s.emitter.item(found.node, i) if s.emitter else None for i in range(len(results))]
    return tuple(Value(v, None, n) for v, n in zip(results, items, strict=True))


users_function = partial(
    run_whole, why="is read by a user's autograd.Function, of which nothing is known"
)
recurred = partial(run_whole, why="is read by a recurrence along another axis")


def reshaped(s: ShardingInterpreter, node: fx.Node) -> Value:
    """What a view has become."""
    return view(s, s.call_of(node))


#: What the ranks of the first axis do together: there the second must not differ between them.
COLLECTIVES = {
    collectives.enter,
    collectives.sum_across,
    collectives.slice_to,
    torch.ops.mosaic.gather.default,
    torch.ops.mosaic.reshard.default,
    torch.ops.mosaic.halo.default,
}

HELPERS: dict[Any, HelperRule] = {
    torch.ops.aten.reshape.default: reshaped,
    collectives.enter: elementwise,
    collectives.sum_across: elementwise,
    broadcast: elementwise,
    collectives.divide_gradient: elementwise,
    collectives.slice_to: moved,
    collectives.slice_share: moved,
    torch.ops.mosaic.gather.default: moved,
    torch.ops.mosaic.reshard.default: moved,
    torch.ops.mosaic.halo.default: moved,
    local_extreme: extreme,
    local_rows: elementwise,
    held_rows: elementwise,
    won: shared_out,
    keep_mask: kept,
    rng.draw_seed: drawn,
    call_autograd_function: users_function,
    segments.run_whole: recurred,
    segments.answered: recurred,
    segments.states: recurred,
    segments.read: recurred,
}
