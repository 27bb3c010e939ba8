"""Tensors of a mask's program as functions of query and key: which of their dims runs along which.

A mask is broadcast to the scores (batch, heads, queries, keys), or to more or fewer dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.graph.emit import insert
from mosaic.graph.ops import differentiable
from mosaic.masks.constants import Constants

aten = torch.ops.aten
#: Coordinates. Scores of three dims have no heads; those of five or more have several batch dims,
#: which count from BATCH + 1 on, as no vector of ids can tell them apart.
KEY, QUERY, HEAD, BATCH = 1, 2, 3, 4

SAME = {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default}
RESHAPED = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
}


@dataclass(frozen=True)
class Term:
    """``node``, whose dim i runs along coordinate ``dims[i]``; 0: its length is 1."""

    node: fx.Node
    dims: tuple[int, ...]

    @property
    def coordinates(self) -> frozenset[int]:
        return frozenset(self.dims) - {0}

    @property
    def is_pairwise(self) -> bool:
        """Whether it has an element for every pair of query and key."""
        return {KEY, QUERY} <= self.coordinates


def coordinates(ndim: int) -> tuple[int, ...]:
    """What each dim of scores with ``ndim`` dims is."""
    few = (BATCH, QUERY, KEY) if ndim == 3 else (BATCH, HEAD, QUERY, KEY)
    return few[-ndim:] if ndim <= 4 else (*range(ndim + 1, BATCH, -1), HEAD, QUERY, KEY)


def along(node: fx.Node, dims: tuple[int, ...]) -> Term:
    """A term with these coordinates, but for the dims of length 1."""
    shape = node.meta["val"].shape
    return Term(node, tuple(d if n != 1 else 0 for d, n in zip(dims, shape, strict=True)))


def broadcast(node: fx.Node, ndim: int) -> Term:
    """A mask of scores with ``ndim`` dims."""
    own = node.meta["val"].ndim
    return along(node, coordinates(ndim)[ndim - own :])


def operand(term: Term, x: fx.Node) -> Term:
    """An operand of the elementwise op ``term.node``, which it is broadcast to."""
    ndim = x.meta["val"].ndim
    return along(x, term.dims[len(term.dims) - ndim :])


def peeled(term: Term, constants: Constants) -> Term | None:
    """What ``term`` looks at, where its node only says which element stands where."""
    node = term.node
    if node.op != "call_function":
        return None
    if node.target in SAME:
        return Term(node.args[0], term.dims)
    if node.target == aten.expand.default:
        return operand(term, node.args[0])
    if node.target in RESHAPED:
        return reshaped(term, node.args[0])
    if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        return moved(term)
    if node.target == aten.index.Tensor:
        return indexed(term, constants)
    return None


def bottom(term: Term, constants: Constants) -> Term:
    """Peeled as far as it goes."""
    while (inner := peeled(term, constants)) is not None:
        term = inner
    return term


def reshaped(term: Term, x: fx.Node) -> Term | None:
    """Only dims of length 1 come or go."""
    before, after = list(x.meta["val"].shape), list(term.node.meta["val"].shape)
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    longer = iter(d for d, n in zip(term.dims, after, strict=True) if n != 1)
    return Term(x, tuple(0 if n == 1 else next(longer) for n in before))


def moved(term: Term) -> Term:
    order = permutation(term.node)
    return Term(term.node.args[0], tuple(term.dims[order.index(d)] for d in range(len(order))))


def permutation(node: fx.Node) -> list[int]:
    """Of a permute, transpose or t: which dim of its operand each dim is."""
    x, *dims = node.args
    ndim = x.meta["val"].ndim
    if node.target == aten.permute.default:
        return [d % ndim for d in dims[0]]
    order = list(range(ndim))
    if ndim > 1:
        a, b = (d % ndim for d in dims or (0, 1))
        order[a], order[b] = b, a
    return order


def indexed(term: Term, constants: Constants) -> Term | None:
    """``x[arange(b)[:, None], arange(n)[None]]``, as vmap writes: x, with its dims moved; and
    ``x[:, arange(n)]``: x."""
    x, indices = term.node.args
    shape = x.meta["val"].shape
    given = [(index, n) for index, n in zip(indices, shape, strict=False) if index is not None]
    if not all(is_run(index, n, constants) for index, n in given):
        return None
    if len(given) == 1 and given[0][0].meta["val"].ndim == 1:
        return Term(x, term.dims)
    if len(given) != len(shape):
        return None
    along = [operand(term, index).coordinates for index, _ in given]
    if any(len(some) > 1 for some in along):
        return None
    dims = tuple(next(iter(some), 0) for some in along)
    is_diagonal = len([d for d in dims if d]) > len(set(dims) - {0})
    return None if is_diagonal else Term(x, dims)


def is_run(index: fx.Node, n: int, constants: Constants) -> bool:
    """Whether an index is 0, 1, 2 ... n - 1."""
    value = constants(index)
    if value is None or value.dtype not in (torch.int64, torch.int32):  # bool and uint8 select
        return False
    return torch.equal(value.long().reshape(-1), torch.arange(n))


def arranged(graph: fx.Graph, term: Term, order: tuple[int, ...]) -> fx.Node:
    """The term with one dim for each of these coordinates, of length 1 where nothing varies."""
    node, gone = term.node, [i for i, d in enumerate(term.dims) if not d]
    wanted = tuple(d if d in term.dims else 0 for d in order)
    if wanted == term.dims:
        return node
    have, kept = [d for d in term.dims if d], [d for d in wanted if d]
    if gone:
        node = made(graph, aten.squeeze.dims, node, gone)
    if have != kept:
        node = made(graph, aten.permute.default, node, [have.index(d) for d in kept])
    for dim, coordinate in enumerate(wanted):
        if not coordinate:
            node = made(graph, aten.unsqueeze.default, node, dim)
    return node


def made(graph: fx.Graph, target: Callable[..., Any], *args: Any, **options: Any) -> fx.Node:
    """``target(*args, **options)`` for its first operand's line, at the insertion point."""
    like = next(a for a in args if isinstance(a, fx.Node))
    node = insert(graph, like, target, args, options)
    needed = any(n.meta.get("needs_gradient") for n in node.all_input_nodes)
    node.meta["needs_gradient"] = needed and differentiable(node.meta["val"])
    return node


def constant(term: Term, constants: Constants) -> tuple[frozenset[int], Tensor] | None:
    """The values of a constant, of length 1 along each dim where they are all the same, and the
    coordinates along which they differ."""
    value = constants(term.node)
    if value is None or not value.numel():
        return None
    differs = set()
    for dim, coordinate in enumerate(term.dims):
        first = value.narrow(dim, 0, 1)
        same = value.shape[dim] == 1 or value.stride(dim) == 0 or bool((value == first).all())
        value = first if same else value
        differs |= set() if same else {coordinate}
    return frozenset(differs), value
