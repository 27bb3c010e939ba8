"""What each attention's mask means: for now causal comes from ``is_causal``, and any other mask
stays a tensor of which each rank computes its own rows (``partition`` hoists the slice)."""

from __future__ import annotations

from torch import fx

from mosaic.context import Context


def analyze_masks(graph: fx.Graph, context: Context) -> int:
    for found, node in context.attentions:
        node.meta["mask"] = ", ".join(
            word for word in ("causal" if found.causal else "", found.mask) if word
        )
    return sum(bool(node.meta["mask"]) for _, node in context.attentions)
