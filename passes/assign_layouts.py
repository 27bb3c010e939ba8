"""Who holds which indices: zigzag when most attention work along the axis is causal, else even.

With even shards the last rank of a causal attention works p times as long as the first; with zigzag
(rank r holds chunks r and 2p-1-r) all work alike. A causal window no longer than a shard is even
work on even shards. Every method is exact on either.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mosaic.layout import Layout
from mosaic.partition.context import Context
from mosaic.partition.values import Axis
from mosaic.passes.propagate import follow, note_places


def assign_layouts(graph: fx.Graph, context: Context) -> int:
    before, context.axes = context.axes, tuple(assigned(a, context) for a in context.axes)
    changed = sum(old != new for old, new in zip(before, context.axes, strict=True))
    if changed:
        note_places(follow(graph, context), context)
    return changed


def assigned(axis: Axis, context: Context) -> Axis:
    along = [a for a, _ in context.attentions if axis.name in a.axes]
    # Many pieces on every rank (the inner axis of a flattened pair) are balanced already.
    causal = sum(
        a.flops for a in along if a.causal and not a.is_window and max(map(len, a.query.ranks)) == 1
    )
    if causal <= sum(a.flops for a in along) / 2 or not along:
        return axis
    return replace(axis, layout=Layout.zigzag(axis.layout.n, axis.p))
