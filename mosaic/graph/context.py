"""What passes read and write beside the graph: the request, the ranks, and the plan as it grows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import fx

from mosaic.api.mesh import MosaicContext
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.capture import Input, Policy
from mosaic.graph.modes import Modes
from mosaic.layout import Place
from mosaic.partition.attention import Attention
from mosaic.partition.values import Axis, Collective


@dataclass(frozen=True)
class World:
    """The ranks of one mesh axis (or of several as one), and which of them this is."""

    size: int
    rank: int
    group: str
    mesh_axis: str = "sp"
    sizes: Mapping[str, int] = field(default_factory=dict)  # of all mesh axes, in their order

    def pairs(self, a: str, b: str) -> list[tuple[int, int]]:
        """For each rank its ranks along two (joint) mesh axes that make up this one."""
        mine = own_axes(self.mesh_axis)
        sizes = {name: n for name, n in self.sizes.items() if name in mine}

        def along(mesh_axis: str, place: tuple[int, ...]) -> int:
            rank = 0
            for index, (name, size) in zip(place, sizes.items(), strict=True):
                rank = rank * size + index if name in own_axes(mesh_axis) else rank
            return rank

        places = product(*map(range, sizes.values()))
        return [(along(a, place), along(b, place)) for place in places]

    @property
    def node_size(self) -> int:
        """How many neighbouring ranks share a node, by torchrun's word; 0 for all of them."""
        names = list(self.sizes)
        inner = names[names.index(self.mesh_axis) + 1 :] if self.mesh_axis in names else []
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        return local // math.prod(self.sizes[name] for name in inner)


def world_of(ranks: MosaicContext | None, mesh_axis: str) -> World:
    """The ranks of a mesh axis; None is a process that is alone."""
    sizes = {} if ranks is None else {name: ranks.size(name) for name in ranks.axes}
    if ranks is None or ranks.size(mesh_axis) == 1:
        return World(1, 0, "", mesh_axis, sizes)
    group = ranks.group_name(mesh_axis)
    return World(ranks.size(mesh_axis), ranks.rank(mesh_axis), group, mesh_axis, sizes)


def device_memory() -> int:
    """Of a GPU, in bytes, the same on every rank; 0 on the CPU, where it is not the limit."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def own_axes(mesh_axis: str) -> set[str]:
    """The mesh's own axes in a joint one."""
    return {name.strip() for name in mesh_axis.split(",")}


@dataclass(frozen=True)
class Output:
    """What the user's program says of one of its outputs beside its values."""

    requires_grad: bool = False
    order: tuple[int, ...] = ()  # its dims from the outermost in memory; () if nothing is said


@dataclass
class Context:
    """Shared by the passes of one graph. ``world`` are all ranks that take part, and ``worlds``
    those of each mesh axis, where that is another."""

    spec: ShardingSpec
    world: World
    inputs: tuple[Input, ...]
    mutated: tuple[int, ...]
    modes: Modes
    arriving: dict[int, Place] = field(default_factory=dict)  # inputs that are shards already
    is_resumed: bool = False  # after a graph break: locals may have other meanings
    is_first_graph: bool = True
    ends_at: str = ""  # the graph break behind this graph, and its reason
    holds_shards: bool = False  # a program that was written for shards: it is only lowered
    graph_text: str = ""
    constants: int = 0  # tensors of the local program that are no inputs
    worlds: dict[str, World] = field(default_factory=dict)
    policies: Mapping[int, Policy] = field(default_factory=dict)  # of selective checkpoints
    outputs: tuple[Output, ...] = ()  # with the new values of mutated inputs first
    axes: tuple[Axis, ...] = ()  # what is cut, on different mesh axes
    attentions: list[tuple[Attention, fx.Node]] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    gathered: list[tuple[str, fx.Node]] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)  # what else ranks must have in common
    output_shards: list[str] = field(default_factory=list)  # how each output is cut, "" if whole
    notes: list[str] = field(default_factory=list)

    def on(self, mesh_axis: str) -> World:
        """The ranks of a mesh axis."""
        return self.world if mesh_axis == self.world.mesh_axis else self.worlds[mesh_axis]

    def arriving_nodes(self, graph: fx.Graph) -> dict[fx.Node, Place]:
        """The placeholders of inputs that arrive cut."""
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        return {placeholders[i]: place for i, place in self.arriving.items()}
