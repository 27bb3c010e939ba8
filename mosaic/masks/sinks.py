"""Sinks that are written out: one more column of the scores, and weights without it.

softmax(cat([scores, expanded(sinks)], -1), -1)[..., :-1]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mosaic.graph.emit import insert
from mosaic.masks.additive import number
from mosaic.masks.constants import Constants
from mosaic.masks.softmax import (
    COPIED,
    HALF,
    Weights,
    ends_gradient,
    is_cast_from_half,
    is_lessened,
)
from mosaic.masks.terms import HEAD, Term, arranged, broadcast, made, peeled

aten = torch.ops.aten


@dataclass(frozen=True)
class Column:
    """``scores`` before they get the column; the column as numbers of heads, or as one number."""

    scores: fx.Node
    sinks: Term | float

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.scores.meta["val"].shape[:-2])

    def write(self, graph: fx.Graph, heads: int) -> fx.Node:
        """Sinks (heads)."""
        if isinstance(self.sinks, float):
            val = self.scores.meta["val"]
            options = {"dtype": val.dtype, "device": val.device}
            return insert(graph, self.scores, aten.full.default, ([heads], self.sinks), options)
        sinks = arranged(graph, self.sinks, (HEAD,))
        return sinks if heads == 1 else made(graph, aten.expand.default, sinks, [heads])


def column(found: Weights, constants: Constants) -> Column | None:
    """What a softmax is over, if the column that its weights leave out is one of sinks."""
    node = found.scores
    if found.left_out is None:
        return None
    while node.op == "call_function" and node.target != aten.cat.default:
        is_same = node.target in COPIED or is_cast_from_half(node) or is_lessened(node)
        if not is_same or ends_gradient(node):
            return None
        node = node.args[0]
    if node.op != "call_function" or ends_gradient(node) or len(node.args[0]) != 2:
        return None
    sinks, scores = node.args[0] if found.left_out == 0 else reversed(node.args[0])
    val, own = node.meta["val"], scores.meta["val"]
    is_last = len(node.args) > 1 and node.args[1] % val.ndim == val.ndim - 1
    is_wider = own.dtype in HALF and val.dtype == torch.float32
    if not is_last or sinks.meta["val"].shape[-1] != 1 or not (own.dtype == val.dtype or is_wider):
        return None
    term = broadcast(sinks, val.ndim)
    known = number(term, constants)
    if known is not None:
        return Column(scores, known)
    term = of_heads(term, constants)
    return Column(scores, term) if term.coordinates <= {HEAD} else None


def of_heads(term: Term, constants: Constants) -> Term:
    """Sinks without the dims along which they are expanded; a detach stays."""
    while term.node.target != aten.detach.default:
        inner = peeled(term, constants)
        if inner is None:
            break
        term = inner
    return term
