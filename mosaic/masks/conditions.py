"""Comparisons of positions and ids: which pairs of query and key satisfy them."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from mosaic.attention.blocks import Band
from mosaic.masks.constants import Constants
from mosaic.masks.terms import BATCH, KEY, QUERY, Term, bottom, constant, operand

aten = torch.ops.aten


def overlap(a: Band, b: Band) -> Band:
    """The keys that both see."""
    return Band(narrower(a.left, b.left), narrower(a.right, b.right))


def narrower(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True)
class Allowed:
    """Any boolean tensor (or number) that must be true, or false."""

    term: Term
    positive: bool = True


@dataclass(frozen=True)
class Documents:
    """Query i sees key j where ``queries[i] == keys[j]``."""

    queries: Term
    keys: Term
    written: Allowed


@dataclass(frozen=True)
class Relative:
    """``band``, but of a vector's numbers at i and j instead of i and j themselves."""

    positions: Term
    band: Band
    written: Allowed


Condition = Band | Documents | Relative | Allowed

NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "eq": "eq", "ne": "ne"}
COMPARED = {
    getattr(getattr(aten, name), overload): name
    for name in NEGATED
    for overload in ("Tensor", "Scalar")
}


@dataclass(frozen=True)
class Linear:
    """A sum of integer vectors, each times a number. A coordinate is 0, 1, 2 ... along itself."""

    weights: Counter[int | Term] = field(default_factory=Counter)
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        weights = Counter(self.weights)
        weights.update(other.weights)  # unlike +, keeps what is negative
        kept = Counter({v: w for v, w in weights.items() if w})
        return Linear(kept, self.constant + other.constant)

    def __neg__(self) -> Linear:
        return Linear(Counter({v: -w for v, w in self.weights.items()}), -self.constant)


def linear(term: Term, constants: Constants) -> Linear | None:
    """An integer tensor as a sum of vectors over one coordinate each, or None."""
    term = bottom(term, constants)
    node, dtype = term.node, term.node.meta["val"].dtype
    if dtype.is_floating_point or dtype.is_complex:
        return None
    found = of_constant(term, constants)
    if found is not None:
        return found
    if constants.is_long(node) or dtype == torch.bool:
        return None if term.is_pairwise else Linear(Counter([term]))
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        a, b = (side(term, x, constants) for x in node.args)
        if a is None or b is None:
            return None
        return a + (b if node.target == aten.add.Tensor else -b)
    return None if term.is_pairwise else Linear(Counter([term]))


def of_constant(term: Term, constants: Constants) -> Linear | None:
    known = constant(term, constants)
    if known is None or len(known[0]) > 1:
        return None
    differs, values = known[0], known[1].reshape(-1)
    first = int(values[0])
    if not differs:
        return Linear(constant=first)
    if values.dtype == torch.bool:  # True is 1 wherever it stands
        return None
    if torch.equal(values, torch.arange(first, first + len(values), dtype=values.dtype)):
        return Linear(Counter(differs), first)
    return None


def side(term: Term, x: object, constants: Constants) -> Linear | None:
    """One operand of the elementwise op ``term.node``."""
    if isinstance(x, fx.Node):
        return linear(operand(term, x), constants)
    return Linear(constant=x) if isinstance(x, int) else None


def comparison(given: Allowed, constants: Constants) -> list[Condition]:
    """What ``a < b`` and its like mean; also ``abs(a) < b``."""
    term, (a, b) = given.term, given.term.node.args
    op = COMPARED[term.node.target]
    op = op if given.positive else NEGATED[op]
    if isinstance(a, fx.Node) and a.target == aten.abs.default and op in ("lt", "le"):
        inside = linear(operand(operand(term, a), a.args[0]), constants)
        most = side(term, b, constants)
        if inside is None or most is None:
            return [given]
        return [c for x in (inside, -inside) for c in related(given, op, x + -most)]
    left, right = side(term, a, constants), side(term, b, constants)
    if left is None or right is None:
        return [given]
    return related(given, op, left + -right)


def related(given: Allowed, op: str, difference: Linear) -> list[Condition]:
    """What ``difference op 0`` says of a query and a key."""
    constant = difference.constant
    if not difference.weights:
        return [] if getattr(operator, op)(constant, 0) else [given]
    by_weight = {w: v for v, w in difference.weights.items()}
    if len(difference.weights) != 2 or set(by_weight) != {1, -1}:
        return [given]
    keys, queries = by_weight[1], by_weight[-1]
    if not runs_along(keys, KEY):  # queries - keys + constant
        keys, queries, op, constant = queries, keys, MIRRORED[op], -constant
    if not (runs_along(keys, KEY) and runs_along(queries, QUERY)):
        return [given]
    band = bounded(op, -constant)
    if isinstance(keys, Term) and isinstance(queries, Term):
        if op == "eq" and constant == 0:
            return [Documents(queries, keys, given)]
        is_same = queries == as_queries(keys)
        return [Relative(queries, band, given)] if band and is_same else [given]
    return [given] if band is None or keys != KEY or queries != QUERY else [band]


def runs_along(vector: int | Term, coordinate: int) -> bool:
    """Whether a vector depends on the key (or the query), and not on the other or the head."""
    if isinstance(vector, int):
        return vector == coordinate
    return coordinate in vector.coordinates and vector.coordinates <= {coordinate, BATCH}


def as_queries(keys: Term) -> Term:
    return replace(keys, dims=tuple(QUERY if d == KEY else d for d in keys.dims))


def bounded(op: str, number: int) -> Band | None:
    """``j - i op number`` as a band."""
    match op:
        case "le":
            return Band(None, number)
        case "lt":
            return Band(None, number - 1)
        case "ge":
            return Band(-number, None)
        case "gt":
            return Band(-number - 1, None)
        case "eq":
            return Band(-number, number)
    return None
