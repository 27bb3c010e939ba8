"""Write this rank's local program. The only pass that makes collectives, and the only one that sees
the rank: it runs the rules that ``propagate`` ran, this time as a ProgramWriter, which has nodes.

    x: f64[2, 37, 5]                  x: f64[2, 37, 5]
    h = linear(x, w, b)          ->   x_rows = slice_to(x, 37=0:10|10:20|20:30|30:37 dim=1)
    m = mean(h, [1])                  h = linear(x_rows, enter(w), enter(b))
                                      m = div(sum_across(sum(h, [1])), 37)

Sizes are computed from places. A whole value stays a recipe until it is needed, and then only the
part that is needed is computed. Of several axes each is written over the program of those before
it: rules know one axis, and that they compose is all that makes two or three exact.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mosaic.api.errors import UnsupportedError
from mosaic.api.methods import Local
from mosaic.graph.emit import insert, rename_all
from mosaic.graph.modes import Modes
from mosaic.graph.source import where
from mosaic.graph.strides import shares_elements
from mosaic.layout import Layout, Place
from mosaic.partition.context import Context, Output
from mosaic.partition.emitter import Emitter
from mosaic.partition.table import RULES
from mosaic.partition.values import Axis, Collective, Value, places_of
from mosaic.partition.writing import ProgramWriter
from mosaic.passes.normalize import mark_gradients, passes_gradients, records_gradients
from mosaic.torch_private import is_alias

aten = torch.ops.aten


def partition(graph: fx.Graph, context: Context) -> int:
    if len(context.axes) > 1:
        plan_together(graph, context)
    count = 0
    for number, axis in enumerate(context.axes or (nothing_cut(context),)):
        writer = write(graph, context, axis, number)
        count += len(writer.collectives)
    return count


def plan_together(graph: fx.Graph, context: Context) -> None:
    """What several axes send, from the global graph: sizes in a later one's program differ by rank.

    What one axis sends of a tensor that others cut is a part of it.
    """
    for planner in context.planners:
        for node in returned(graph):
            planner.current = node
            planner.gather(planner.env[node], "an output is whole", node)
        others = [other for other in context.planners if other is not planner]
        for node, sent in zip(planner.recorded, planner.collectives, strict=True):
            cut = (other.axis.p for other in others if node and places_of(other.env.get(node)))
            context.collectives.append(replace(sent, bytes=sent.bytes // prod(cut)))


def returned(graph: fx.Graph) -> list[fx.Node]:
    tensors = (n for n in graph.output_node().args[0] if isinstance(n, fx.Node))
    return [n for n in tensors if isinstance(n.meta.get("val"), torch.Tensor)]


def write(graph: fx.Graph, context: Context, axis: Axis, number: int) -> ProgramWriter:
    """Write the program of this rank along one axis; the second one's over the first one's."""
    old = list(graph.nodes)
    output, placeholders = graph.output_node(), graph.find_nodes(op="placeholder")
    world, spec = context.on(axis.mesh_axis), context.spec
    arriving = context.arriving_nodes(graph, axis.mesh_axis)
    is_last = number + 1 >= len(context.axes)
    emitter = Emitter(graph, world.rank, world.group, Modes.current())
    writer = ProgramWriter(
        axis,
        RULES,
        emitter=emitter,
        on_gather=spec.on_gather,
        gradients=spec.gradients,
        arriving=arriving,
        is_over_shards=number > 0,
    )
    with graph.inserting_before(output):
        writer.run(old)
        written = len(context.mutated)
        targets = [placeholders[index] for index in context.mutated]
        pairs = zip(output.args[0][:written], targets, strict=True)
        updates = [updated(writer, new, arriving.get(target)) for new, target in pairs]
        outputs = [result(writer, r, not context.stays_cut) for r in output.args[0][written:]]
        if is_last:
            outputs = [
                (as_promised(emitter, out, said), shard)
                for (out, shard), said in zip(outputs, context.outputs[written:], strict=True)
            ]
            write_back(emitter, [node for node, _ in updates], context)
        emitter.switch(Modes.current())
    output.args = (tuple(node for node, _ in (outputs if is_last else updates + outputs)),)
    before = context.output_shards or [()] * len(outputs)
    cut = zip(before, outputs, strict=True)
    context.output_shards = [(*shards, shard) if shard else shards for shards, (_, shard) in cut]
    erase(graph, old)
    rename_all(graph)
    report(writer, context)
    if not is_last:
        mark_gradients(graph)
    return writer


def report(writer: ProgramWriter, context: Context) -> None:
    """What the plan shows, and what the ranks compare."""
    if len(context.axes) < 2:
        context.collectives += writer.collectives
    if writer.entered_bytes:
        context.collectives.append(gradients_of(writer))
    context.gathered += writer.gathered
    context.decided += writer.decided


def nothing_cut(context: Context) -> Axis:
    """A graph without an axis is written whole, by the same engine: it too may write to its inputs
    and draw random numbers, which must be the same on every rank."""
    world = context.world
    whole = Layout.whole(1, world.size)
    return Axis("", world.mesh_axis, whole, Local(mesh=world.mesh_axis))


def gradients_of(writer: ProgramWriter) -> Collective:
    """What backward sums across the ranks: one all-reduce for each entered tensor, bucketed."""
    p = writer.axis.p
    sent = writer.entered_bytes * 2 * (p - 1) // p
    why = "gradients of whole tensors, in backward"
    return Collective("all_reduce", writer.axis.name, sent, why, "parameters")


def result(writer: ProgramWriter, node: Any, whole: bool) -> tuple[Any, str]:
    """The local node of an output, and how it stays cut ("" when it is whole)."""
    writer.current = node if isinstance(node, fx.Node) else None
    value = writer.env[node] if isinstance(node, fx.Node) else None
    if not isinstance(value, Value):
        return node, ""
    if value.place is None or whole:
        out = writer.node(writer.gather(value, "an output is whole", node))
        check_share(writer, out, node)
        return apart(writer.emitter, out), ""
    out = apart(writer.emitter, writer.node(value))
    if shared_input(writer.emitter.graph, out):  # autograd would make it of the whole input
        out = insert(writer.emitter.graph, node, aten.clone.default, (out,))
    return out, writer.emitter.shard(value.place)


def updated(writer: ProgramWriter, node: Any, place: Place | None) -> tuple[Any, str]:
    """The new value of an input that is written to, cut as the input is."""
    if place is None:
        return result(writer, node, whole=True)
    writer.current = node
    return apart(writer.emitter, writer.node(writer.at(writer.env[node], place))), ""


def shared_input(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The input whose memory a node's value is in. AOTAutograd makes such an output by a view of
    the input, outside of the graph: what the graph does with the gradient is lost."""
    val = node.meta["val"]
    inputs = (n for n in graph.nodes if n.op == "placeholder")
    tensors = (n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor))
    return next((n for n in tensors if is_alias(n.meta["val"], val)), None)


def check_share(writer: ProgramWriter, out: fx.Node, node: fx.Node) -> None:
    """Raise UnsupportedError for a parameter, or a view of it, as an output: its gradient comes
    from outside whole, where others give shares."""
    if writer.gradients == "whole" or writer.axis.p == 1:
        return
    shared = shared_input(writer.emitter.graph, out)
    if shared is not None and shared.meta.get("is_state") and shared.meta.get("requires_grad"):
        raise UnsupportedError(
            f"the program returns parameter {shared.name} or a view of it, and gradients are "
            "shares: what comes back for it is a whole gradient",
            where=where(node),
            fix="return a copy (w.clone()), or leave gradients whole",
        )


def apart(emitter: Emitter, node: fx.Node) -> fx.Node:
    """An output that was unfolded or expanded, with memory for each element: AOTAutograd lays its
    gradient out in the same way, and adds up what meets at one place."""
    if not shares_elements(node.meta["val"]):
        return node
    options = {"memory_format": torch.contiguous_format}
    return emitter.op(node, aten.clone.default, (node,), options)


def as_promised(emitter: Emitter, out: Any, said: Output) -> Any:
    """An output as eager mode would give it, beside its values."""
    out = tied(emitter, out) if said.requires_grad else out
    return laid_out(emitter, out, said.order) if said.order else out


def laid_out(emitter: Emitter, out: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """An output with its dims in the order that they have in the user's memory: views, and draws
    of its form, that follow a graph break depend on it."""
    if out.meta["val"].permute(order).is_contiguous() or shared_input(emitter.graph, out):
        return out
    back = [order.index(d) for d in range(len(order))]
    dense = emitter.op(out, aten.permute.default, (out, list(order)), {})
    options = {"memory_format": torch.contiguous_format}
    dense = emitter.op(out, aten.clone.default, (dense,), options)
    return emitter.op(out, aten.permute.default, (dense, back), {})


def tied(emitter: Emitter, out: fx.Node) -> fx.Node:
    """An output that the rules made of constants alone (all of it is padding, or written over), or
    a view under ``no_grad``, though autograd says that it requires a gradient (which is zero): a
    sum of no elements of an input is added."""
    if is_learned(out):
        return out
    device = out.meta["val"].device
    inputs = (n for n in emitter.graph.nodes if n.meta.get("requires_grad"))
    source = next((n for n in inputs if n.meta["val"].device == device), None)
    if source is None:
        return out
    emitter.switch(Modes.current())
    flat = emitter.op(source, aten.reshape.default, (source, [-1]), {})
    none = emitter.op(source, aten.slice.Tensor, (flat, 0, 0, 0), {})
    zero = emitter.op(source, aten.sum.default, (none,), {"dtype": out.meta["val"].dtype})
    return emitter.op(source, aten.add.Tensor, (out, zero), {})


def is_learned(out: fx.Node) -> bool:
    """Whether autograd finds an input that requires a gradient behind a node."""
    todo, seen = [out], {out}
    while todo:
        node = todo.pop()
        if node.meta.get("requires_grad"):
            return True
        if not passes_gradients(node) or not records_gradients(node):
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        todo += new
        seen.update(new)
    return False


def write_back(emitter: Emitter, updates: list[Any], context: Context) -> None:
    """In-place updates of inputs (BatchNorm's buffers): AOTAutograd keeps a copy_ to an input."""
    placeholders = [n for n in emitter.graph.nodes if n.op == "placeholder"]
    for index, new in zip(context.mutated, updates, strict=True):
        target = placeholders[index]
        read_from_copy(emitter, target)
        emitter.op(new, aten.copy_.default, (target, new), {})


def read_from_copy(emitter: Emitter, target: fx.Node) -> None:
    """What backward saved of an input must be what it was before the write: the copy is saved, a
    second one in backward would be of what was written."""
    saved = {"recompute": CheckpointPolicy.MUST_SAVE}
    with emitter.graph.inserting_before(emitter.first()):
        copy = insert(emitter.graph, target, aten.clone.default, (target,), meta=saved)
    target.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def erase(graph: fx.Graph, old: list[fx.Node]) -> None:
    for node in reversed(old):
        if node.op == "call_function":
            graph.erase_node(node)
