"""Follow the axes through the program: ``meta["place"]`` of every node, and who attends over them.

The rules run without a rank and write nothing; layouts are still provisional (even), since the
choice between even and zigzag needs to know the attentions first.
"""

from __future__ import annotations

from torch import fx

from mosaic.context import Context
from mosaic.errors import ShardingError
from mosaic.handwritten.softmax import unread_softmax
from mosaic.local.attention import Attention, flattened, with_axis
from mosaic.masks.op import ATTENTIONS
from mosaic.notices import UNKNOWN
from mosaic.sharder import Sharder
from mosaic.source import line
from mosaic.values import Axis, places_of


def propagate(graph: fx.Graph, context: Context) -> int:
    planners = follow(graph, context)
    for key, planner in zip(("place", "second place"), planners, strict=False):
        for node, value in planner.env.items():
            node.meta[key] = places_of(value)
    context.attentions = attended(planners, context)
    for axis in context.axes:
        if context.spec.sharded and not any(axis.name in a.axes for a, _ in context.attentions):
            raise nothing_attends(graph, axis)
    return sum(node.meta.get("place") is not None for node in graph.nodes)


def follow(graph: fx.Graph, context: Context) -> list[Sharder]:
    """Each axis followed through the global graph as if it were the only one."""
    planners = [Sharder(a, arriving=context.arriving_nodes(graph)) for a in context.axes]
    for planner in planners:
        planner.run(list(graph.nodes))
    return planners


def attended(planners: list[Sharder], context: Context) -> list[tuple[Attention, fx.Node]]:
    """What was decided about each attention, for all axes together."""
    found: dict[fx.Node, Attention] = {}
    for planner in planners:
        for mine, call in planner.attentions:
            before = found.get(call.like)
            found[call.like] = mine if before is None else merged(before, mine, call.like, context)
    return [(attention, node) for node, attention in found.items()]


def merged(a: Attention, b: Attention, node: fx.Node, context: Context) -> Attention:
    """One attention that two axes meet in; of one that attends over both ``partition`` is told."""
    if a.axes and b.axes:
        first, second = context.axes
        node.meta["both"] = flattened(a, b, (first, second), context.world, node)
        return node.meta["both"]
    return with_axis(a, b, None)


def nothing_attends(graph: fx.Graph, axis: Axis) -> ShardingError:
    attended = [n for n in graph.nodes if n.target in ATTENTIONS]
    lengths = sorted({n.args[0].meta["val"].shape[-2] for n in attended})
    unread = unread_softmax(graph)
    facts = {"note": f"{UNKNOWN}: {line(unread)}"} if unread else {}
    return ShardingError(
        f"nothing attends over axis {axis.name!r}, so there is no reason to cut it",
        sizes=f"{axis.name} = {axis.layout.n}; lengths attended over: "
        + (", ".join(map(str, lengths)) or "none"),
        **facts,
        fix="name the axis that attention runs over, or leave the spec out to have it found",
    )
