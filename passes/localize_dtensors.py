"""DTensors become this rank's parts: from here on the program is that of one rank of their axis.

    w: f64[16, 8]  cut along dim 0 over tp      w: f64[8, 8]
    h = from_rank(x, -1, "tp", 2)           ->  h = enter(x)
    h = linear(h, w)                            h = linear(h, w)
    y = to_rank(h, 2, "", "tp", 2)              y: f64[2, 13, 8] = h

The rules that cut an axis over ``sp`` cut this one, too: a row-parallel layer's product is a
partial sum, and meets at once. What lies outside of the DTensors is one rank's already,
and stays as it is. The collectives over ``tp`` are then ops like others for the axes that later
passes cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mosaic.api.methods import Local
from mosaic.graph.emit import rename_all
from mosaic.graph.modes import Modes
from mosaic.layout import Layout, Place
from mosaic.partition.context import Context
from mosaic.partition.emitter import Emitter
from mosaic.partition.table import RULES
from mosaic.partition.values import Axis, Value
from mosaic.partition.writing import ProgramWriter
from mosaic.passes.normalize import mark_gradients
from mosaic.passes.partition import report
from mosaic.runtime import collectives
from mosaic.runtime.dtensors import PARTIAL

moves = torch.ops.mosaic


def localize_dtensors(graph: fx.Graph, context: Context) -> int:
    if context.parallel is None:
        return 0
    world, placeholders = context.parallel, graph.find_nodes(op="placeholder")
    whole = Layout.whole(1, world.size)
    writer = Localizer(
        Axis(world.mesh_axis, world.mesh_axis, whole, Local(mesh=world.mesh_axis)),
        RULES,
        emitter=Emitter(graph, world.rank, world.group, Modes.current()),
        on_gather=context.spec.on_gather,
        arriving={placeholders[index]: place for index, place in context.dtensors.items()},
    )
    old, output = list(graph.nodes), graph.output_node()
    with graph.inserting_before(output):
        writer.run(old)
        given = (result(writer, x) for x in output.args[0])
        output.args = (tuple(given),)
        writer.emitter.switch(Modes.current())
    for node in reversed(old):
        if node.op == "call_function":
            graph.erase_node(node)
    rename_all(graph)
    mark_gradients(graph)
    report(writer, context)
    return len(writer.collectives)


def result(writer: ProgramWriter, node: Any) -> Any:
    value = writer.env[node] if isinstance(node, fx.Node) else None
    return writer.node(value) if isinstance(value, Value) else node


@dataclass(kw_only=True)
class Localizer(ProgramWriter):
    """Writes what is over one mesh axis as one rank's."""

    def value_of(self, node: fx.Node) -> Any:
        move = MOVES.get(node.target)
        return move(self, node) if move else super().value_of(node)

    def placed(self, x: Value, node: fx.Node, dim: int) -> Value:
        """A tensor of the whole program cut along ``dim``, or whole."""
        if x.place is not None and x.place.dim != dim:
            x = self.gather(x, "a DTensor is redistributed", node)
        return self.at(x, self.place(x, dim)) if dim >= 0 else x

    def place(self, x: Value, dim: int) -> Place:
        return Place(Layout.even(x.shape[dim], self.axis.p), dim, mesh_axis=self.axis.mesh_axis)


def started(s: Localizer, node: fx.Node) -> Value:
    x, dim = s.env[node.args[0]], node.args[1]
    mine, val = s.node(x), node.meta["val"]
    if dim == PARTIAL:
        return s.joined(Value(val, None, mine), node, "partial sums of a DTensor meet", "sum")
    return Value(val, s.place(Value(val), dim) if dim >= 0 else None, mine)


def moved(s: Localizer, node: fx.Node) -> Value:
    return s.placed(s.env[node.args[0]], node, node.args[1])


def ended(s: Localizer, node: fx.Node) -> Value:
    dim, gradient = node.args[1:3]
    mine = s.node(s.placed(s.env[node.args[0]], node, dim))
    if gradient:  # of the ranks' gradients
        mine = s.emitter.function(node, collectives.enter, (mine, s.emitter.group))
    if gradient == "avg":
        mine = s.emitter.function(node, collectives.divide_gradient, (mine, s.axis.p))
    return Value(node.meta["val"], None, mine)


MOVES = {
    moves.from_rank.default: started,
    moves.redistribute.default: moved,
    moves.to_rank.default: ended,
}
