"""Follow the axis through the program: ``meta["place"]`` of every node, and who attends over it.

The rules run without a rank and write nothing; layouts are still provisional (even), since the
choice between even and zigzag needs to know the attentions first.
"""

from __future__ import annotations

from torch import fx

from mosaic.context import Context
from mosaic.errors import ShardingError
from mosaic.masks.op import ATTENTIONS
from mosaic.sharder import Sharder
from mosaic.values import Axis, places_of


def propagate(graph: fx.Graph, context: Context) -> int:
    if context.axis is None:
        return 0
    planner = Sharder(context.axis, arriving=context.arriving_nodes(graph))
    planner.run(list(graph.nodes))
    places = 0
    for node, value in planner.env.items():
        node.meta["place"] = places_of(value)
        places += node.meta["place"] is not None
    context.attentions = [(found, call.like) for found, call in planner.attentions]
    if context.spec.sharded and not any(a.is_distributed for a, _ in context.attentions):
        raise nothing_attends(graph, context.axis)
    return places


def nothing_attends(graph: fx.Graph, axis: Axis) -> ShardingError:
    attended = [n for n in graph.nodes if n.target in ATTENTIONS]
    lengths = sorted({n.args[0].meta["val"].shape[-2] for n in attended})
    return ShardingError(
        f"nothing attends over axis {axis.name!r}, so there is no reason to cut it",
        sizes=f"{axis.name} = {axis.layout.n}; lengths attended over: "
        + (", ".join(map(str, lengths)) or "none"),
        fix="name the axis that attention runs over, or leave the spec out to have it found",
    )
