"""What passes read and write beside the graph: the request, the ranks, and the plan as it grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from mosaic.capture import Input
from mosaic.layout import Place
from mosaic.local.attention import Attention
from mosaic.modes import Modes
from mosaic.spec import ShardingSpec
from mosaic.values import Axis, Collective


@dataclass(frozen=True)
class World:
    """The ranks of one mesh axis, and which of them this is."""

    size: int
    rank: int
    group: str
    mesh_axis: str = "sp"
    sizes: Mapping[str, int] = field(default_factory=dict)  # of all mesh axes


@dataclass
class Context:
    """Shared by the passes of one graph."""

    spec: ShardingSpec
    world: World
    inputs: tuple[Input, ...]
    mutated: tuple[int, ...]
    modes: Modes
    arriving: dict[int, Place] = field(default_factory=dict)  # inputs that are shards already
    is_resumed: bool = False  # after a graph break: locals may have other meanings
    is_first_graph: bool = True
    holds_shards: bool = False  # a program that was written for shards: it is only lowered
    graph_text: str = ""
    axis: Axis | None = None
    attentions: list[tuple[Attention, fx.Node]] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    gathered: list[tuple[str, fx.Node]] = field(default_factory=list)
    output_shards: list[str] = field(default_factory=list)  # how each output is cut, "" if whole
    notes: list[str] = field(default_factory=list)

    def arriving_nodes(self, graph: fx.Graph) -> dict[fx.Node, Place]:
        """The placeholders of inputs that arrive cut."""
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        return {placeholders[i]: place for i, place in self.arriving.items()}
