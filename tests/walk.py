"""Walks through the graphs that a rank runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic.layout import Layout
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


def strips_of_masks(plans: Sequence[Plan], n: int, p: int) -> list[str]:
    """Tensors of all keys of a rank's rows, or of more: a mask, or scores, that is not made by
    blocks. Only of graphs that a rank runs."""
    rows = {n, *Layout.even(n, p).lengths, *Layout.zigzag(n, p).lengths}
    shapes = [
        (kind, node, list(getattr(node.meta.get("val"), "shape", ())))
        for plan in plans
        for kind, graph in plan.graphs.items()
        if kind != "global"
        for node in graph.nodes
    ]
    return [
        f"{kind} graph: {node} {node.target} {shape}"
        for kind, node, shape in shapes
        if n in shape and sum(size in rows for size in shape) > 1
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
