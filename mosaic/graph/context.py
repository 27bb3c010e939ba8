"""What passes read and write beside the graph: the request, the ranks, and the plan as it grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from mosaic.api.spec import ShardingSpec
from mosaic.frontend.capture import Input, Policy
from mosaic.graph.modes import Modes
from mosaic.layout import Place
from mosaic.partition.attention import Attention
from mosaic.partition.values import Axis, Collective
from mosaic.runtime.world import World


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
