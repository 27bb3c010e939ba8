"""Who holds which indices: zigzag when most attention work along the axis is causal, else even.

With even shards the last rank of a causal attention works p times as long as the first; with zigzag
(rank r holds chunks r and 2p-1-r) all work alike. A causal window no longer than a shard is even
work on even shards. Every method is exact on either.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mosaic.context import Context
from mosaic.layout import Layout


def assign_layouts(graph: fx.Graph, context: Context) -> int:
    if context.axis is None:
        return 0
    along = [a for a, _ in context.attentions if a.is_distributed]
    causal = sum(a.flops for a in along if a.causal and not a.is_window)
    if causal <= sum(a.flops for a in along) / 2 or not along:
        return 0
    layout = Layout.zigzag(context.axis.layout.n, context.axis.p)
    context.axis = replace(context.axis, layout=layout)
    return 1
