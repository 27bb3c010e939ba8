"""Comparisons of positions and ids: which pairs of query and key satisfy them."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

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
    """A sum of integer vectors, each times a number. A coordinate is 0, 1, 2 ... along itself.

    All its elements are in ``least ... most``: what a dtype cannot hold would wrap.
    """

    weights: Counter[int | Term] = field(default_factory=Counter)
    constant: int = 0
    least: int = 0
    most: int = 0

    @classmethod
    def number(cls, x: int) -> Linear:
        return cls(constant=x, least=x, most=x)

    def __add__(self, other: Linear) -> Linear:
        weights = Counter(self.weights)
        weights.update(other.weights)  # unlike +, keeps what is negative
        kept = Counter({v: w for v, w in weights.items() if w})
        bounds = self.least + other.least, self.most + other.most
        return Linear(kept, self.constant + other.constant, *bounds)

    def __neg__(self) -> Linear:
        weights = Counter({v: -w for v, w in self.weights.items()})
        return Linear(weights, -self.constant, -self.most, -self.least)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether each element is the same number in ``dtype``."""
        return limits(dtype)[0] <= self.least and self.most <= limits(dtype)[1]


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest number."""
    if dtype == torch.bool:
        return 0, 1
    info = torch.iinfo(dtype)
    return info.min, info.max


#: Positions and ids of int64 that come as data are taken to be no larger, so that a window's few
#: hundred may be added to them. Of narrower dtypes anything may come, up to their limits.
LARGEST = 2**62


def of_data(term: Term) -> Linear:
    """A vector whose numbers are not known."""
    least, most = limits(term.node.meta["val"].dtype)
    return Linear(Counter([term]), 0, max(least, -LARGEST), min(most, LARGEST))


def linear(term: Term, constants: Constants) -> Linear | None:
    """An integer tensor as a sum of vectors over one coordinate each, or None."""
    term = bottom(term, constants)
    node, dtype = term.node, term.node.meta["val"].dtype
    if dtype.is_floating_point or dtype.is_complex:
        return None
    found = of_constant(term, constants)
    if found is not None:
        return found
    if constants.is_long(node):
        return None if term.is_pairwise else of_data(term)
    if node.target in SUMS and not node.kwargs and dtype != torch.bool:
        return exact_sum(term, constants)
    return None if term.is_pairwise else of_data(term)


SUMS = {aten.add.Tensor, aten.sub.Tensor}


def exact_sum(term: Term, constants: Constants) -> Linear | None:
    """A sum or difference in whose dtype no number wraps; None where one might."""
    dtype = term.node.meta["val"].dtype
    a, b = (side(term, x, constants) for x in term.node.args)
    if a is None or b is None:
        return None
    total = a + (b if term.node.target == aten.add.Tensor else -b)
    return total if all(x.fits(dtype) for x in (a, b, total)) else None


def of_constant(term: Term, constants: Constants) -> Linear | None:
    known = constant(term, constants)
    if known is None or len(known[0]) > 1:
        return None
    differs, values = known[0], known[1].reshape(-1)
    first = int(values[0])
    if not differs:
        return Linear.number(first)
    if values.dtype == torch.bool:  # True is 1 wherever it stands
        return None
    last = first + len(values) - 1
    if last < LARGEST and torch.equal(values.long(), torch.arange(first, last + 1)):
        return Linear(Counter(differs), first, first, last)
    return None


def side(term: Term, x: object, constants: Constants) -> Linear | None:
    """One operand of the elementwise op ``term.node``."""
    if isinstance(x, fx.Node):
        return linear(operand(term, x), constants)
    return Linear.number(x) if isinstance(x, int) else None


def comparison(given: Allowed, constants: Constants) -> list[Condition]:
    """What ``a < b`` and its like mean; also ``abs(a) < b``."""
    term, (a, b) = given.term, given.term.node.args
    op = COMPARED[term.node.target]
    op = op if given.positive else NEGATED[op]
    if isinstance(a, fx.Node) and a.target == aten.abs.default and op in ("lt", "le"):
        inside = linear(operand(operand(term, a), a.args[0]), constants)
        most = side(term, b, constants)
        if inside is None or most is None or not (-inside).fits(a.meta["val"].dtype):
            return [given]
        if not (most.fits(common := compared_as(a, b)) and inside.fits(common)):
            return [given]
        return [c for x in (inside, -inside) for c in related(given, op, x + -most)]
    left, right = side(term, a, constants), side(term, b, constants)
    if left is None or right is None:
        return [given]
    if not (left.fits(common := compared_as(a, b)) and right.fits(common)):
        return [given]
    return related(given, op, left + -right)


def compared_as(*sides: object) -> torch.dtype:
    """The dtype in which two operands are compared: 300 is 44 beside uint8."""
    vals = (x.meta["val"] if isinstance(x, fx.Node) else x for x in sides)
    like: list[Any] = [
        torch.empty([1] * x.ndim, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in vals
    ]
    return torch.result_type(*like)


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
        wide = queries.node.meta["val"].dtype == torch.int64
        return [Relative(queries, band, given)] if band and is_same and wide else [given]
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
