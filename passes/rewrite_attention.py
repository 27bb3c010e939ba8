"""Attention nodes that carry a decision become one opaque op with everything it needs in a string.

    y = sdpa(q, k, v, mask)     ->   y, lse = mosaic.attention(q, k, v, mask, ..., seed, plan)

and with Ulysses, which exchanges sequence for heads before it and back after it,

    q, k, v = exchange_heads([q, k, v], to_heads=True)
    y, lse = mosaic.attention(q, k, v, mask, ..., seed, plan)
    (y,) = exchange_heads([y], to_heads=False)

The op is opaque to AOTAutograd and has its own backward; ``lower_attention`` opens it afterwards.
Queries come as ``(batch, heads, seq, head_dim)``: other ranks are folded into it and back.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from mosaic.attention.op import calls_of, sharded_attention, taken_off
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem, combined
from mosaic.attention.visit import Inputs
from mosaic.graph.emit import insert, splice
from mosaic.graph.source import where
from mosaic.layout import Place, Shard
from mosaic.partition.context import Context
from mosaic.passes.choose_method import resolved

aten = torch.ops.aten


def rewrite_attention(graph: fx.Graph, context: Context) -> int:
    nodes = [n for n in graph.nodes if "attention" in n.meta]
    for node in nodes:
        with graph.inserting_before(node):
            out = rewritten(graph, node, context)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    return len(nodes)


def rewritten(graph: fx.Graph, node: fx.Node, context: Context) -> fx.Node:
    q, k, v, mask = node.args
    queries, keys = (node.kwargs.get(name) for name in ("query_documents", "key_documents"))
    leaves = tuple(node.kwargs.get("leaves", ()))
    operands = tuple(four_dims(graph, node, x) for x in (q, k, v))
    sinks = node.kwargs.get("sinks")
    mask, seed = mask_of(graph, node, mask, q), node.meta["seed"]
    inputs = Inputs(mask, queries, keys, seed, leaves, sinks)
    last = node.prev
    heads = [x.meta["val"].shape[1] for x in operands]
    plan, has_lse = plan_of(node, context), node.kwargs.get("lse", False)
    calls = calls_of(plan, *heads[:2])
    out = splice(graph, node, sharded_attention, (*operands, inputs, calls, has_lse))
    if has_lse:
        out = with_shift(graph, node, out, operands, inputs, plan)
    while (last := last.next) is not node:
        last.meta.pop("recompute", None)  # what was sent for is kept
    return reshaped(graph, node, out, list(node.meta["val"].shape))


def with_shift(
    graph: fx.Graph,
    node: fx.Node,
    out: fx.Node,
    operands: tuple[fx.Node, ...],
    inputs: Inputs,
    plan: AttentionPlan,
) -> fx.Node:
    """``out`` with the whole log-sum-exp in its last column."""
    learned = [x for x in (inputs.mask, *inputs.leaves) if x is not None]
    known = {x: insert(graph, node, aten.detach.default, (x,)) for x in learned}
    mask = None if inputs.mask is None else known[inputs.mask]
    inputs = inputs._replace(mask=mask, leaves=[known[leaf] for leaf in inputs.leaves])
    missing = splice(graph, node, taken_off, (*operands, inputs, plan.encode()))
    return out if missing is None else insert(graph, node, aten.add.Tensor, (out, missing))


def plan_of(node: fx.Node, context: Context) -> AttentionPlan:
    parts: tuple[AttentionProblem, ...] = node.meta["attention"]
    found, planned = combined(parts, context.on, where(node)), node.meta.get("problem")
    if planned is None or not planned.needs_as(found):  # written late, in parts
        planned, _ = resolved(found, context)
    world = context.on(found.mesh)
    cut = [encoded(place, context) for place in (found.batch_cut, found.heads_cut)]
    return AttentionPlan(
        strategy=planned.strategy,
        rank=world.rank,
        group=world.group,
        query=found.query,
        key=found.key,
        band=found.band,
        scale=found.scale,
        dropout=found.dropout,
        site=found.site,
        batch=cut[0],
        heads=cut[1],
        tile=found.tile,
        scores=found.scores,
        seen=found.seen.layout(found.query) if found.seen and found.axes else None,
    )


def encoded(place: Place | None, context: Context) -> str:
    if place is None:
        return ""
    world = context.on(place.mesh_axis)
    return Shard(place.at(0), world.rank, world.group).encode()


def four_dims(graph: fx.Graph, node: fx.Node, x: fx.Node) -> fx.Node:
    shape = list(x.meta["val"].shape)
    lead = [prod(shape[:-2]), 1] if len(shape) < 4 else [prod(shape[:-3]), shape[-3]]
    return reshaped(graph, node, x, [*lead, *shape[-2:]])


def mask_of(graph: fx.Graph, node: fx.Node, mask: fx.Node | None, q: fx.Node) -> fx.Node | None:
    """A mask that broadcasts to the folded queries."""
    if mask is None:
        return None
    ndim, shape = q.meta["val"].ndim, list(mask.meta["val"].shape)
    shape = [1] * (max(ndim, 3) - len(shape)) + shape
    if ndim <= 3:
        return reshaped(graph, node, mask, [shape[0], 1, *shape[1:]])
    if ndim > 4 and prod(shape[:-3]) != 1:
        full = [*q.meta["val"].shape[:-3], *shape[-3:]]
        mask = insert(graph, node, aten.expand.default, (mask, full))
        return four_dims(graph, node, mask)
    return reshaped(graph, node, mask, shape[-4:])


def reshaped(graph: fx.Graph, node: fx.Node, x: fx.Node, shape: list[int]) -> fx.Node:
    if list(x.meta["val"].shape) == shape:
        return x
    return insert(graph, node, aten.reshape.default, (x, shape))
