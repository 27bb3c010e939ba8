"""Follow the axes through the program: ``meta["places"]`` of every node, who attends over them.

The rules run without a rank and write nothing; layouts are still provisional (even), since the
choice between even and zigzag needs to know the attentions first.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.attention.problem import AttentionProblem, combined
from mosaic.graph.source import line, where
from mosaic.masks.op import ATTENTIONS
from mosaic.masks.softmax import UNKNOWN, unread_softmax
from mosaic.partition.context import Context
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.table import RULES
from mosaic.partition.values import Axis, places_of
from mosaic.passes.infer_axes import MIXERS, Search, behind
from mosaic.recurrences.loops import LOOP, loops


def propagate(graph: fx.Graph, context: Context) -> int:
    planners = follow(graph, context)
    if begin_again(graph, planners, context) or leave_whole(planners, context):
        planners = follow(graph, context)
    note_places(planners, context)
    context.notes += [note for planner in planners for note in loop_over(graph, planner)]
    is_found = context.arriving or context.goes_on or context.has_other_names
    if context.spec.sharded and not is_found:
        for axis, planner in zip(context.axes, planners, strict=True):
            if not attends(planner):
                raise nothing_attends(graph, axis, planner)
    return sum(any(node.meta.get("places", ())) for node in graph.nodes)


def note_places(planners: list[ShardingInterpreter], context: Context) -> None:
    """``meta["places"]``: where each axis is in a node. And the attentions, of all axes together:
    ``meta["planned"]`` has what each axis makes of one."""
    context.planners = planners
    for node in planners[0].env if planners else ():
        node.meta["places"] = tuple(places_of(planner.env[node]) for planner in planners)
    found: dict[fx.Node, dict[str, AttentionProblem]] = {}
    for planner in planners:
        for part, call in planner.attentions:
            found.setdefault(call.like, {})[planner.axis.name] = part
    context.attentions = []
    for node, parts in found.items():
        node.meta["planned"] = parts
        whole = combined(tuple(parts.values()), context.on, where(node))
        context.attentions.append((whole, node))


def loop_over(graph: fx.Graph, planner: ShardingInterpreter) -> list[str]:
    """A note on the first loop over the axis, or over as many rows that do not hold it."""
    for node, x, dim in loops(graph):
        place = planner.env[x].place
        if place and place.dim == dim:
            return [f"{LOOP}; each row is sent to every rank by itself: {line(node)}"]
        if place is None and x.meta["val"].shape[dim] == planner.axis.layout.n:
            return [f"{LOOP}; it runs whole on every rank: {line(node)}"]
    return []


def attends(planner: ShardingInterpreter) -> bool:
    """Whether an attention runs over the axis, or a recurrence along it."""
    return bool(planner.recurrences) or any(found.axes for found, _ in planner.attentions)


def begin_again(graph: fx.Graph, planners: list[ShardingInterpreter], context: Context) -> bool:
    """A named axis that is gathered before any attention runs over it (by a stem of convolutions)
    is cut again where it was gathered, if it is as long there."""
    named = context.spec.sharded and not context.arriving
    if len(planners) != 1 or not named or attends(planners[0]):
        return False
    (planner,), (axis,) = planners, context.axes
    search, late = Search(graph), behind(graph, {node for _, node in planner.gathered})
    found = {
        (begin.node.name, begin.place.dim): begin.node
        for node in graph.nodes
        if node.target in MIXERS
        for begin in search.begins(node)
        if begin.place.layout.n == axis.layout.n and begin.node in late
    }
    if found:
        context.axes = (replace(axis, seeds=(*axis.seeds, *found)),)
        lines = ", ".join(line(node) for node in found.values())
        context.notes.append(f"axis {axis.name!r} is cut again behind what gathers it: {lines}")
    return bool(found)


def leave_whole(planners: list[ShardingInterpreter], context: Context) -> bool:
    """In a later graph (behind a break) arguments of other functions have the same names: an axis
    that was bound to one, and that nothing attends over there, is none."""
    if context.is_first_graph or not context.spec.sharded or context.arriving:
        return False
    kept = [a for a, p in zip(context.axes, planners, strict=True) if attends(p)]
    changed = len(kept) < len(context.axes)
    context.axes = tuple(kept)
    return changed


def follow(graph: fx.Graph, context: Context) -> list[ShardingInterpreter]:
    """Each axis followed through the global graph as if it were the only one."""
    planners = [
        ShardingInterpreter(a, RULES, arriving=context.arriving_nodes(graph, a.mesh_axis))
        for a in context.axes
    ]
    for planner in planners:
        planner.run(list(graph.nodes))
    return planners


def nothing_attends(graph: fx.Graph, axis: Axis, planner: ShardingInterpreter) -> ShardingError:
    attended = [n for n in graph.nodes if n.target in ATTENTIONS]
    lengths = sorted({n.args[0].meta["val"].shape[-2] for n in attended})
    unread = unread_softmax(graph)
    facts = {"note": f"{UNKNOWN}: {line(unread)}"} if unread else {}
    for node, _, _ in loops(graph):
        facts.setdefault("note", f"{LOOP}: {line(node)}")
    if planner.gathered:
        why, node = planner.gathered[0]
        facts["gathered"] = f"{why}: {line(node)}"
    return ShardingError(
        f"nothing attends over axis {axis.name!r}, so there is no reason to cut it",
        sizes=f"{axis.name} = {axis.layout.n}; lengths attended over: "
        + (", ".join(map(str, lengths)) or "none"),
        **facts,
        fix="name the axis that attention runs over, or leave the spec out to have it found",
    )
