"""What passes read and write beside the graph: the request, the ranks, and the plan as it grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mosaic.api.spec import ShardingSpec
from mosaic.attention.problem import AttentionProblem
from mosaic.graph.inputs import Input, Policy
from mosaic.graph.lengths import Length
from mosaic.graph.modes import Modes
from mosaic.layout import Place
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Axis, Collective
from mosaic.runtime.deferred_tensor import Recipe
from mosaic.runtime.world import World, own_axes


@dataclass(frozen=True)
class Output:
    """What the user's program says of one of its outputs beside its values."""

    requires_grad: bool = False
    order: tuple[int, ...] = ()  # its dims from the outermost in memory; () if nothing is said


@dataclass
class Context:
    """Shared by the passes of one graph. ``world`` are all ranks that take part, and ``worlds``
    those of each mesh axis that is cut, and of several of them together."""

    spec: ShardingSpec
    world: World
    inputs: tuple[Input, ...]
    mutated: tuple[int, ...]
    modes: Modes
    #: Inputs that are shards already: for each mesh axis where it cuts them.
    arriving: Mapping[int, tuple[Place, ...]] = field(default_factory=dict)
    parallel: World | None = None  # the ranks that DTensors are over,
    dtensors: Mapping[int, Place] = field(default_factory=dict)  # and which inputs they cut
    stays_cut: bool = False  # outputs that hold an axis, for who takes ShardedTensors
    has_other_names: bool = False  # than the spec: after a break, or of a part of a model
    is_first_graph: bool = True
    goes_on: bool = False  # in other graphs of the same function
    holds_shards: bool = False  # a program that was written for shards: it is only lowered
    length: Length | None = None  # of the axis, where it is data
    output_rows: list[tuple[Place, ...]] = field(default_factory=list)  # of outputs, then
    graph_text: str = ""
    constants: int = 0  # tensors of the local program that are no inputs
    worlds: Sequence[World] = ()
    policies: Mapping[int, Policy] = field(default_factory=dict)  # of selective checkpoints
    checks: Sequence[Callable[[Sequence[Any]], None]] = ()  # of its inputs, before it runs
    outputs: tuple[Output, ...] = ()  # with the new values of mutated inputs first
    axes: tuple[Axis, ...] = ()  # what is cut, on different mesh axes
    planners: list[ShardingInterpreter] = field(default_factory=list)  # one for each axis
    attentions: list[tuple[AttentionProblem, fx.Node]] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    gathered: list[tuple[str, fx.Node]] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)  # what else ranks must have in common
    output_shards: list[tuple[str, ...]] = field(default_factory=list)  # how each output is cut
    recipes: list[Recipe | None] = field(default_factory=list)  # of the user's outputs, if any
    notes: list[str] = field(default_factory=list)

    def on(self, mesh_axis: str) -> World:
        """The ranks of a (joint) mesh axis."""
        names = own_axes(mesh_axis)
        return next(w for w in (self.world, *self.worlds) if own_axes(w.mesh_axis) == names)

    def arriving_nodes(self, graph: fx.Graph, mesh_axis: str) -> dict[fx.Node, Place]:
        """The placeholders of inputs that a mesh axis cuts already."""
        nodes = [n for n in graph.nodes if n.op == "placeholder"]
        cut = ((nodes[i], place) for i, places in self.arriving.items() for place in places)
        return {node: place for node, place in cut if place.mesh_axis == mesh_axis}
