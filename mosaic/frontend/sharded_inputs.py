"""Inputs that arrive already cut (``inputs_are="shards"``): their layout and their global length.

A tensor that ``mosaic.shard_tensor`` or ``mosaic.as_shard`` made carries its layout; another one is
refused, as a length does not say which part it is. Dynamo must not have baked the local length into
the program, so that it can be traced again at the global one: they mark the dim as dynamic. What
was decided at the local length (an ``if``, a loop) must be what would be decided at the global one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec, binds
from mosaic.graph.inputs import Input
from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.world import World, own_axes
from mosaic.torch_private import broken_guard, guarded_attribute, placeholder_source, size_symbols

#: For the number of an input where each mesh axis cuts it.
Arriving = dict[int, tuple[Place, ...]]
MARK = "_mosaic_shard"  # where shard_tensor writes the layout


def arriving_shards(
    module: fx.GraphModule,
    inputs: tuple[Input, ...],
    spec: ShardingSpec,
    worlds: Sequence[World],
) -> Arriving:
    """The places of every input that arrives cut; {} when all are whole. ``worlds``: the ranks of
    each mesh axis."""
    of = {world.mesh_axis: world for world in worlds}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    found: Arriving = {}
    for path, dim, mesh in cut_dims(spec) if spec.inputs_are == "shards" else ():
        for given in inputs:
            if of[mesh].size > 1 and not given.is_state and binds(path, given.source):
                place = place_of(placeholders[given.index], path, dim, of[mesh])
                found[given.index] = (*found.get(given.index, ()), place)
    return found


def cut_dims(spec: ShardingSpec) -> list[tuple[str, int, str]]:
    """(argument path, dim, mesh axis) of every named dim that is cut."""
    return [
        (path, names.split().index(str(axis)), method.mesh)
        for path, names in (spec.inputs or {}).items()
        for axis, method in spec.sharded.items()
        if axis in names.split()
    ]


def place_of(node: fx.Node, path: str, dim: int, world: World) -> Place:
    value = node.meta["example_value"]
    layout = recorded(node, dim, world)
    if layout is None:
        raise ShardingError(
            f"{path} arrives cut, and carries no layout along dim {dim}",
            sizes=f"{[local_size(s) for s in value.shape]} on this rank",
            fix="make it with mosaic.shard_tensor(whole, dim), or of a part of your own with "
            "mosaic.as_shard(part, dim, layout=...); what is computed from a shard (h * 1.0) is a "
            "plain tensor, of which nobody knows how it is cut: say it again",
        )
    if not isinstance(value.shape[dim], torch.SymInt) and value.shape[dim] < 2:
        raise ShardingError(
            f"this rank's part of {path} is too short: Dynamo builds lengths 0 and 1 "
            "into the program",
            sizes=f"{list(value.shape)}, cut in dim {dim}",
            fix='use fewer ranks, or pass whole inputs (inputs_are="whole")',
        )
    if not isinstance(value.shape[dim], torch.SymInt):
        raise ShardingError(
            f"{path} arrives cut, but its local length is built into the program",
            sizes=f"{list(value.shape)}, cut in dim {dim}",
            fix="compile it without dynamic=False and mark_static; "
            "a model that hard-codes its length cannot take shards",
        )
    local = int(value.shape[dim].node.hint)
    mine = layout.lengths[world.rank]
    if mine != local:
        raise ShardingError(
            f"the shard of {path} is not the part that its layout says",
            sizes=f"dim {dim} has {local}, the layout {mine} on rank {world.rank}",
            fix="cut it as torch.chunk does, or with mosaic.shard_tensor",
        )
    return Place(layout, dim, mesh_axis=world.mesh_axis)


def recorded(node: fx.Node, dim: int, world: World) -> Layout | None:
    """What ``shard_tensor`` wrote on the tensor. A guard on it, as a part of another whole may be
    as long as this one."""
    spec = guarded_attribute(node, MARK)
    places = [] if spec is None else [Shard.decode(text).place for text in spec.split(";")]
    mine = (p for p in places if own_axes(p.mesh_axis) == own_axes(world.mesh_axis))
    return next((p.layout for p in mine if p.dim == dim), None)


def local_size(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def global_sizes(module: fx.GraphModule, arriving: Arriving) -> dict[Any, int]:
    """Dynamo's symbols of local lengths, and the global lengths that they stand for.

    Raises ShardingError for a program that would be another one at its global lengths.
    """
    if not arriving:
        return {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    cut = [(placeholders[i], place) for i, places in arriving.items() for place in places]
    sizes = [node.meta["example_value"].shape[place.dim] for node, place in cut]
    known: dict[Any, int] = {}
    for (_, place), size in zip(cut, sizes, strict=True):
        for symbol in size_symbols(size):
            if known.setdefault(symbol, place.layout.n) != place.layout.n:
                raise ShardingError(
                    "two inputs arrive cut to one local length, but their global lengths differ",
                    sizes=f"{known[symbol]} and {place.layout.n}",
                    fix="pass one of them whole",
                )
    check_others_are_whole(placeholders, arriving, known)
    check_decisions(sizes[0], known)
    return known


def check_others_are_whole(
    placeholders: list[fx.Node], arriving: Arriving, known: dict[Any, int]
) -> None:
    """No other dim has the symbol of a local length: Dynamo gives one to all that are equal."""
    for index, node in enumerate(placeholders):
        shape: list[Any] = list(getattr(node.meta["example_value"], "shape", ()))
        for dim, size in enumerate(shape):
            is_cut = dim in [place.dim for place in arriving.get(index, ())]
            if is_cut or not isinstance(size, torch.SymInt) or not size_symbols(size) & set(known):
                continue
            name = Input(index, *placeholder_source(node)).name
            raise ShardingError(
                f"dim {dim} of {name} has the local length of an input that arrives cut, "
                "and nothing says that it is cut too",
                sizes=[local_size(s) for s in shape],
                fix="name that dim in inputs={...}, or, if it is that long by chance, call "
                f"torch._dynamo.mark_static({name}, {dim})",
            )


def check_decisions(size: torch.SymInt, known: dict[Any, int]) -> None:
    """Whatever Python did with the local length, it would have done with the global one.

    Every ``if``, ``range`` and ``int`` of the user's program, and every choice of torch's own that
    the shapes follow from, left a guard when Dynamo traced it at the local length. A rank that
    raises here tells the others (``exchange.report_failure``), whose own length may have decided
    as the global one does.
    """
    found = broken_guard(size, known)
    if found is None:
        return
    condition, user_line = found
    n = ", ".join(map(str, sorted(set(known.values()))))
    raise ShardingError(
        "the program depends on the length of an input that arrives cut: "
        "on one device it would take another way",
        where=None if user_line is None else shortened(user_line),
        condition=f"{condition}, with n the length",
        lengths=f"{size.node.hint} on this rank, {n} on one device",
        fix='pass whole inputs (inputs_are="whole"), '
        "or let the model do the same whatever the length is",
    )


def shortened(user_line: str) -> str:
    """Dynamo's "code  # some/path/model.py:3 in forward", as errors show where they come from."""
    code, _, frame = user_line.rpartition("  # ")
    return f"{Path(frame).name}\n  {code}"
