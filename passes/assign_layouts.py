"""Who holds which indices: zigzag when most attention work along the axis is causal, else even;
many zigzags of short chunks when it is within documents.

With even shards the last rank of a causal attention works p times as long as the first; with zigzag
(rank r holds chunks r and 2p-1-r) all work alike. A causal window no longer than a shard is even
work on even shards. Where documents begin is data, and not known here: of short chunks every rank
has about as much of each. Kernels must compute the mask pair by pair then: there are many pieces.
Where it is known (fixed blocks, prefixes), pairs are counted: even shards or a zigzag that balance
them keep what sees each other together. Every method is exact on any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from mosaic.attention.problem import AttentionProblem
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
    some = [a for a in along if not a.is_window and max(map(len, a.query.ranks)) == 1]
    half = sum(a.flops for a in along) / 2
    n, p = axis.layout.n, axis.p
    if sum(a.flops for a in some if a.seen is not None) > half:
        known = [a for a in some if a.seen is not None]
        for layout in (axis.layout, Layout.zigzag(n, p)):
            if is_balanced(known, layout):
                return replace(axis, layout=layout)
    if sum(a.flops for a in some if a.documents and not a.dense) > half:
        return replace(axis, layout=Layout.zigzags(n, p))
    if sum(a.flops for a in some if a.causal) > half:
        return replace(axis, layout=Layout.zigzag(n, p))
    return axis


def is_balanced(known: Sequence[AttentionProblem], layout: Layout) -> bool:
    """Whether the busiest rank has at most a tenth more pairs of queries and keys than the mean."""
    pairs = [
        sum(a.seen.pairs(held) for a in known if a.seen and a.query.n == layout.n)
        for held in layout.ranks
    ]
    return 0 < max(pairs) * layout.p <= 1.1 * sum(pairs)
