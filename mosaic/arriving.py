"""Inputs that arrive already cut (``inputs_are="shards"``): their layout and their global length.

A tensor that ``mosaic.shard_tensor`` made carries its layout. One that the user cut is read as
``Layout.even``, its global length the sum of the ranks' lengths, which they tell each other through
the process group's store. Dynamo must not have baked the local length into the program, so that it
can be traced again at the global one: ``shard_tensor`` marks the dim as dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from mosaic import agreement
from mosaic.capture import Input
from mosaic.context import World
from mosaic.errors import ShardingError
from mosaic.layout import Layout, Place, Shard
from mosaic.spec import ShardingSpec, binds

Arriving = dict[int, Place]


def arriving_shards(
    module: fx.GraphModule,
    inputs: tuple[Input, ...],
    spec: ShardingSpec,
    world: World,
    group: dist.ProcessGroup | None,
) -> Arriving:
    """The place of every input that arrives cut, by the input's number; {} when all are whole."""
    if spec.inputs_are == "whole" or world.size == 1:
        return {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    found = {
        given.index: place_of(placeholders[given.index], path, dim, world, group)
        for path, dim in cut_dims(spec)
        for given in inputs
        if not given.is_state and binds(path, given.source)
    }
    return found


def cut_dims(spec: ShardingSpec) -> list[tuple[str, int]]:
    """(argument path, dim) of every named dim that is cut."""
    return [
        (path, names.split().index(axis))
        for path, names in (spec.inputs or {}).items()
        for axis in spec.sharded
        if axis in names.split()
    ]


def place_of(
    node: fx.Node, path: str, dim: int, world: World, group: dist.ProcessGroup | None
) -> Place:
    value = node.meta["example_value"]
    if not isinstance(value.shape[dim], torch.SymInt):
        raise ShardingError(
            f"{path} arrives cut, but its local length is built into the program",
            sizes=f"{list(value.shape)}, cut in dim {dim}",
            fix="make it with mosaic.shard_tensor(whole, dim), "
            "or call torch._dynamo.maybe_mark_dynamic(shard, dim) on it; "
            "a model that hard-codes its length cannot take shards",
        )
    local = int(value.shape[dim].node.hint)
    layout = recorded(node, dim) or even(local, world, group)
    mine = layout.lengths[world.rank]
    if mine != local:
        raise ShardingError(
            f"the shard of {path} is not the part that its layout says",
            sizes=f"dim {dim} has {local}, the layout {mine} on rank {world.rank}",
            fix="cut it as torch.chunk does, or with mosaic.shard_tensor",
        )
    return Place(layout, dim, mesh_axis=world.mesh_axis)


def recorded(node: fx.Node, dim: int) -> Layout | None:
    """What ``shard_tensor`` wrote on the tensor; Dynamo keeps a tensor's attributes."""
    spec = (node.meta.get("tensor_dict") or {}).get("_mosaic_shard")
    if spec is None:
        return None
    place = Shard.decode(spec).place
    return place.layout if place.dim == dim else None


def even(local: int, world: World, group: dist.ProcessGroup | None) -> Layout:
    assert group is not None  # there are several ranks
    lengths = agreement.exchange(group, str(local))
    return Layout.even(sum(int(n) for n in lengths), world.size)


def global_sizes(module: fx.GraphModule, arriving: Arriving) -> dict[Any, int]:
    """Dynamo's symbols of local lengths, and the global lengths that they stand for."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    known: dict[Any, int] = {}
    for index, place in arriving.items():
        symbol = placeholders[index].meta["example_value"].shape[place.dim].node.expr
        if known.setdefault(symbol, place.layout.n) != place.layout.n:
            raise ShardingError(
                "two inputs arrive cut to one local length, but their global lengths differ",
                sizes=f"{known[symbol]} and {place.layout.n}",
                fix="pass one of them whole",
            )
    return known
