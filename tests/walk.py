"""Walks through the graphs that a rank runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic.report.plan import Plan


def whole_activations(plans: Sequence[Plan], n: int) -> list[str]:
    """Floating-point tensors as long as the axis, n, in the forward and backward graphs of a rank,
    without those that its plan names."""
    return [
        f"{kind} graph {number}: {node} {node.target} {list(node.meta['val'].shape)}"
        for number, plan in enumerate(plans)
        for kind, graph in plan.graphs.items()
        if kind in ("forward", "backward")
        for node in graph.nodes
        if is_long(node.meta.get("val"), n) and not is_named(node.meta["val"], kind, plan)
    ]


def is_long(x: object, n: int) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    return any(size == n and step for size, step in zip(x.shape, x.stride(), strict=True))


def is_named(x: torch.Tensor, kind: str, plan: Plan) -> bool:
    """Keys and values of an attention that gathers them, and gradients of whole values."""
    is_of_keys = x.ndim == 4 and any(a.method == "all_gather" for a in plan.attentions)
    sums = any("gradient of a whole value" in c.why for c in plan.collectives)
    return is_of_keys or (kind == "backward" and sums)
