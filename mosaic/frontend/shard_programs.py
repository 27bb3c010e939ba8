"""Programs written for shards: a graph that holds Mosaic's own eager ops is not cut, only lowered.

What such a program cuts is its author's affair: sizes are local, and may differ between ranks.
"""

from __future__ import annotations

import torch
from torch import fx

import mosaic.runtime.collectives  # noqa: F401 (registers the ops)
from mosaic.api.errors import ShardingError, UnsupportedError
from mosaic.api.spec import ShardingSpec
from mosaic.eager.functional import attention_node, parameters_node
from mosaic.eager.modules import grid_node
from mosaic.eager.tensors import gather_node
from mosaic.frontend.capture import capture
from mosaic.graph.emit import is_call
from mosaic.graph.modes import Modes
from mosaic.graph.source import line, where
from mosaic.masks.op import ATTENTIONS
from mosaic.partition.context import Context
from mosaic.passes.normalize import normalize
from mosaic.passes.raise_attention import raise_attention
from mosaic.report.plan import Plan, plan_of
from mosaic.runtime.world import World

_ops = torch.ops.mosaic
EAGER = {
    *(attention_node, grid_node, parameters_node, gather_node),
    *(op for name in ("attention", "exchange_heads", "gather", "reshard")
      for op in (getattr(_ops, name), getattr(_ops, name).default)),
}  # fmt: skip


def first_call(module: fx.GraphModule) -> fx.Node | None:
    """The first of Mosaic's eager ops in Dynamo's graph, or in a checkpointed region of it."""
    graphs = (m.graph for m in module.modules() if isinstance(m, fx.GraphModule))
    return next((n for graph in graphs for n in graph.nodes if n.target in EAGER), None)


def passed_through(
    module: fx.GraphModule, first: fx.Node, spec: ShardingSpec, world: World
) -> tuple[fx.GraphModule, Context, Plan]:
    """Dynamo's graph as it is. Raises for a spec that cuts an axis, and for an attention beside
    Mosaic's own of which nobody knows whether its axis is cut."""
    if spec.sharded:
        raise ShardingError(
            "this program works on shards already, and the spec cuts an axis",
            where=where(first),
            axes=", ".join(map(repr, spec.sharded)),
            fix="compile it without axes, or write it for whole tensors, without Mosaic's modules",
        )
    captured = capture(module)  # specialises sizes, too: another length is compiled anew
    context = Context(spec, world, captured.inputs, (), Modes.current(), holds_shards=True)
    normalize(captured.graph, context)
    raise_attention(captured.graph, context)
    for node in captured.graph.nodes:
        if node.target not in ATTENTIONS:
            continue
        raise UnsupportedError(
            "an attention beside Mosaic's own, in a program that works on shards already",
            where=where(node),
            fix="use mosaic.attention(q, k, v, method), with 'local' if its axis is not cut",
        )
    # Local sizes may differ, so what the ranks compare are the ops alone.
    context.graph_text = "\n".join(str(n.target) for n in captured.graph.nodes if is_call(n))
    context.notes.append(f"works on shards already ({line(first)}): it is only lowered")
    return module, context, plan_of(context, [])
