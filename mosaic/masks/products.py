"""An attention's two products, by matmul, bmm, baddbmm or einsum, with dims in its own order.

einsum says by letters what matmul says by position: ``bqhd,bkhd->bhqk`` are scores (batch, heads,
queries, keys), and ``bhqk,bkhd->bqhd`` the weighted values with their dims in another order.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from mosaic.masks.terms import made, permutation

aten = torch.ops.aten
MATMULS = (aten.bmm.default, aten.matmul.default)
PRODUCTS = (*MATMULS, aten.baddbmm.default, aten.einsum.default)
SWAPPED = (aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Operand:
    """``node`` with its dims in another order: dim i is the node's ``order[i]``, or of length 1."""

    node: fx.Node
    order: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.node.meta["val"].shape
        return tuple(1 if d is None else own[d] for d in self.order)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[:-2]

    def write(self, graph: fx.Graph) -> fx.Node:
        """At the insertion point; nothing where the dims are in order."""
        node, order = self.node, self.order
        if node.target in SWAPPED and None not in order:  # a transpose of a transpose is none
            inner = permutation(node)
            node, order = node.args[0], tuple(inner[d] for d in order if d is not None)
        kept = [d for d in order if d is not None]
        if kept != sorted(kept):
            node = permuted(graph, node, kept)
        for dim, d in enumerate(order):
            if d is None:
                node = made(graph, aten.unsqueeze.default, node, dim)
        return node


@dataclass(frozen=True)
class Scores:
    """q (..., queries, dim) and k (..., keys, dim), whose product is scaled, and added to."""

    q: Operand
    k: Operand
    scale: float = 1.0
    bias: fx.Node | None = None


@dataclass(frozen=True)
class Weighted:
    """The product of ``weights`` (..., queries, keys) and v (..., keys, dim), in another order."""

    weights: fx.Node
    v: Operand
    order: tuple[int, ...]


def scores(node: fx.Node) -> Scores | None:
    """The product of queries and keys, if ``node`` is one."""
    if node.target in MATMULS:
        return of_matmul(*node.args)
    if node.target == aten.baddbmm.default and node.kwargs.get("beta", 1) in (0, 1):
        bias = node.args[0] if node.kwargs.get("beta", 1) else None
        found = of_matmul(*node.args[1:])
        return found and replace(found, scale=node.kwargs.get("alpha", 1), bias=bias)
    terms = letters(node)
    if terms is None or len(terms[1]) < 3:
        return None
    (a, b), out = terms
    *batch, query, key = list(out)
    left, right = node.args[1]
    if query not in a:
        a, b, left, right = b, a, right, left
    inner = [x for x in a if x in b and x not in out]
    shares = any(x in a and x in b for x in batch)
    if not shares or len(inner) != 1 or query not in a or key not in b or query in b or key in a:
        return None
    if not set(a) | set(b) <= {*out, *inner}:
        return None
    return Scores(
        Operand(left, placed([*batch, query, *inner], a)),
        Operand(right, placed([*batch, key, *inner], b)),
    )


def of_matmul(q: fx.Node, kt: fx.Node) -> Scores | None:
    ndim = q.meta["val"].ndim
    if ndim != kt.meta["val"].ndim or ndim < 3:
        return None
    order = tuple(range(ndim))
    return Scores(Operand(q, order), Operand(kt, (*order[:-2], ndim - 1, ndim - 2)))


def weighted(node: fx.Node) -> Weighted | None:
    """What may be the product of weights and values."""
    if node.target in MATMULS:
        weights, v = node.args
        order = tuple(range(v.meta["val"].ndim))
        return Weighted(weights, Operand(v, order), order)
    terms = letters(node)
    if terms is None:
        return None
    found = (of_einsum(node, number, *terms) for number in (0, 1))
    return next((x for x in found if x is not None and len(x.order) > 2), None)


def of_einsum(node: fx.Node, number: int, terms: list[str], out: str) -> Weighted | None:
    """With operand ``number`` as the weights."""
    w, v = terms[number], terms[1 - number]
    if len(w) < 3 or set(w) - set(out) != {w[-1]} or w[-1] not in v or w[-2] in v:
        return None
    *batch, query, key = list(w)
    dim = [x for x in v if x in out and x not in w]
    if len(dim) != 1 or not set(v) <= {*w, *dim}:
        return None
    weights, values = node.args[1][number], node.args[1][1 - number]
    order = [[*batch, query, *dim].index(x) for x in out]
    return Weighted(weights, Operand(values, placed([*batch, key, *dim], v)), tuple(order))


def letters(node: fx.Node) -> tuple[list[str], str] | None:
    """The dims of an einsum's operands (two) and of its result: a letter each, also for ``...``."""
    if node.target != aten.einsum.default or len(node.args[1]) != 2 or "->" not in node.args[0]:
        return None
    given, out = node.args[0].replace(" ", "").split("->")
    terms = given.split(",")
    unused = "".join(x for x in string.ascii_letters if x not in given)
    ndims = [x.meta["val"].ndim for x in node.args[1]]
    hidden = [n - len(t.replace("...", "")) for n, t in zip(ndims, terms, strict=True)]
    lead = unused[: max(hidden)]
    terms = [t.replace("...", lead[len(lead) - n :]) for n, t in zip(hidden, terms, strict=True)]
    out = out.replace("...", lead)
    is_plain = all(len(set(term)) == len(term) for term in (*terms, out))
    return (terms, out) if is_plain else None


def placed(wanted: Sequence[str], have: str) -> tuple[int | None, ...]:
    return tuple(have.index(x) if x in have else None for x in wanted)


def permuted(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """A transpose where two dims change places: it is shorter to read."""
    ndim = len(order)
    moved = [d for d in range(ndim) if order[d] != d]
    if not moved:
        return node
    if len(moved) == 2:
        return made(graph, aten.transpose.int, node, *(d - ndim for d in moved))
    return made(graph, aten.permute.default, node, list(order))
