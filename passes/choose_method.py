"""How each attention is done: the spec's method, where both sides are cut.

Whole keys need no exchange: such an attention is "local" whatever the axis's method is, and
``propagate`` has said so already. A cost model that chooses belongs here.
"""

from __future__ import annotations

from torch import fx

from mosaic.context import Context


def choose_method(graph: fx.Graph, context: Context) -> int:
    for found, node in context.attentions:
        node.meta["method"] = found.method
    return sum(found.is_distributed for found, _ in context.attentions)
