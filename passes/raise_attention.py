"""matmul -> scale -> (+ mask) -> softmax -> (dropout) -> matmul becomes one attention node.

    scores = matmul(q, transpose(k, -2, -1))
    scores = mul(scores, scale); scores = add(scores, mask)     in any order, each at most once
    out = matmul(dropout(softmax(scores, -1)), v)
        ->  out = sdpa(q, k, v, mask, dropout_p, scale=scale)

Unmodified models need this: ``nn.MultiheadAttention`` with its default ``need_weights=True`` never
calls SDPA. Legal because nothing else reads the scores or the weights. A mask filled with a finite
number stays as it is: a row that it masks everywhere averages all keys, and an attention would not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mosaic.context import Context
from mosaic.masks.op import PLAIN
from mosaic.rewrite import insert

aten = torch.ops.aten
MATMULS = (aten.bmm.default, aten.matmul.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PASSED = (aten.clone.default, aten.contiguous.default)


@dataclass
class Found:
    """q, k (still transposed), v, and what stands between them."""

    q: fx.Node
    kt: fx.Node
    v: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    keep: fx.Node | None = None  # a boolean mask: where it is False a score was -inf
    dropout: float = 0.0


def raise_attention(graph: fx.Graph, context: Context) -> int:
    count = 0
    for node in list(graph.nodes):
        found = find_attention(node)
        if found:
            rewrite(graph, node, found)
            count += 1
    graph.eliminate_dead_code()
    return count


def find_attention(node: fx.Node) -> Found | None:
    if node.target not in MATMULS:
        return None
    weights, v = node.args
    dropout = 0.0
    weights = passed(weights)
    if weights.target == aten.dropout.default and alone(weights):
        dropout = weights.args[1] if weights.args[2] else 0.0
        weights = passed(weights.args[0])
    if weights.target not in SOFTMAX or not alone(weights) or not along_last(weights):
        return None
    if weights.meta["val"].dtype != weights.args[0].meta["val"].dtype:
        return None
    return find_scores(weights.args[0], v, dropout)


def find_scores(scores: fx.Node, v: fx.Node, dropout: float) -> Found | None:
    scale, mask, keep = 1.0, None, None
    while alone(scores):
        if scores.target in MATMULS:
            q, kt = scores.args
            fits = q.meta["val"].ndim == kt.meta["val"].ndim == v.meta["val"].ndim >= 3
            return Found(q, kt, v, scale, mask, keep, dropout) if fits else None
        if scores.target == aten.baddbmm.default and mask is keep is None and plain(scores):
            return Found(scores.args[1], scores.args[2], v, scale, scores.args[0], None, dropout)
        constant = scores.args[1] if len(scores.args) > 1 else None
        if scores.target == aten.mul.Tensor and isinstance(constant, (int, float)):
            scale *= constant
        elif scores.target == aten.div.Tensor and isinstance(constant, (int, float)):
            scale /= constant
        elif scores.target == aten.add.Tensor and mask is keep is None and scale == 1.0:
            mask = constant if isinstance(constant, fx.Node) and not scores.kwargs else None
        elif is_inf_fill(scores) and mask is keep is None and scale == 1.0:
            keep = scores.args[1]
        else:
            return None
        if scores.target == aten.add.Tensor and mask is None:
            return None
        scores = scores.args[0]
    return None


def plain(node: fx.Node) -> bool:
    return not node.kwargs


def is_inf_fill(node: fx.Node) -> bool:
    return node.target == aten.masked_fill.Scalar and node.args[2] == -float("inf")


def passed(node: fx.Node) -> fx.Node:
    while node.target in PASSED and alone(node):
        node = node.args[0]
    return node


def alone(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1


def along_last(node: fx.Node) -> bool:
    return node.args[1] % node.meta["val"].ndim == node.meta["val"].ndim - 1


def rewrite(graph: fx.Graph, node: fx.Node, found: Found) -> None:
    with graph.inserting_before(node):
        k = transposed(graph, node, found.kt)
        mask = found.mask
        if found.keep is not None:
            mask = insert(graph, node, aten.logical_not.default, (found.keep,))
        # Kernels take four dims, and nn.MultiheadAttention's bmm has three: one head each.
        flat = node.meta["val"].ndim == 3
        q, k, v, mask = (lifted(graph, node, x) if flat else x for x in (found.q, k, found.v, mask))
        args = (q, k, v, mask, found.dropout)
        new = insert(graph, node, PLAIN, args, {"scale": found.scale}, name="attention")
        new.meta["site"] = len(graph.nodes)
        new.meta["needs_gradient"] = node.meta.get("needs_gradient", True)
        if flat:
            new = insert(graph, node, aten.squeeze.dim, (new, 1))
            new.meta["needs_gradient"] = node.meta.get("needs_gradient", True)
    node.replace_all_uses_with(new)


def lifted(graph: fx.Graph, like: fx.Node, x: fx.Node | None) -> fx.Node | None:
    """``(n, s, d)`` as ``(n, 1, s, d)``; a mask of two dims broadcasts as it is."""
    if x is None or x.meta["val"].ndim < 3:
        return x
    out = insert(graph, like, aten.unsqueeze.default, (x, 1))
    out.meta["needs_gradient"] = x.meta.get("needs_gradient", True)
    return out


def transposed(graph: fx.Graph, like: fx.Node, kt: fx.Node) -> fx.Node:
    ndim = kt.meta["val"].ndim
    swapped = {ndim - 2, ndim - 1}
    if kt.target == aten.transpose.int and {d % ndim for d in kt.args[1:]} == swapped:
        return kt.args[0]
    k = insert(graph, like, aten.transpose.int, (kt, -2, -1))
    k.meta["needs_gradient"] = kt.meta.get("needs_gradient", True)
    return k
