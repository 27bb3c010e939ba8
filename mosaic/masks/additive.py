"""Reads float masks: what is 0 or -inf is a boolean mask in disguise, the rest is a bias.

``finfo.min`` in place of -inf means something else in a row that is masked everywhere: there all
keys, later ones too, get equal weights. Such a mask is read only where no row can be like that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mosaic.attention.blocks import Band
from mosaic.masks.conditions import Allowed, Condition
from mosaic.masks.constants import Constants, is_filled
from mosaic.masks.read import Mask, Reader, band_of, flat, joined
from mosaic.masks.terms import KEY, QUERY, Term, constant, operand, peeled

aten = torch.ops.aten
INF = float("inf")
#: In a wider dtype no score is told from bfloat16's lowest number, either.
LOWEST = torch.finfo(torch.bfloat16).min
WHERE = {
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
}


@dataclass(frozen=True)
class Additive:
    """The sum of ``biases`` where all conditions hold, ``fill`` elsewhere."""

    conditions: tuple[Condition, ...] = ()
    biases: tuple[Term, ...] = ()
    fill: float = -INF

    def __add__(self, other: Additive) -> Additive | None:
        if self == NOTHING or other == NOTHING:
            return other if self == NOTHING else self
        if (self.fill, other.fill) != (-INF, -INF):
            return None
        return Additive(self.conditions + other.conditions, self.biases + other.biases)


NOTHING = Additive()


def meaning(mask: Term, constants: Constants) -> tuple[Mask, float]:
    """What a mask says, boolean or added, and the number that hides."""
    if mask.node.meta["val"].dtype == torch.bool:
        return joined(Reader(constants)(Allowed(mask)), constants), -INF
    added = additive(mask, constants)
    return joined(added.conditions, constants, added.biases), added.fill


def additive(term: Term, constants: Constants) -> Additive:
    """What is added to the scores: at worst ``term`` itself, as a bias."""
    if constants.is_long(term.node):
        return Additive(biases=(term,))
    inner = peeled(term, constants)
    if inner is not None:
        below = additive(inner, constants)
        ends = term.node.target == aten.detach.default and below.biases  # these get no gradient
        return Additive(biases=(term,)) if ends else below
    readers = (zero, total, cast, filled, triangle, values)
    found = (read(term, constants) for read in readers)
    return next((x for x in found if x is not None), Additive(biases=(term,)))


def lowest(term: Term) -> float:
    return max(torch.finfo(term.node.meta["val"].dtype).min, LOWEST)


def number(x: object, constants: Constants) -> float | None:
    """A number, or what a constant tensor holds everywhere."""
    if not isinstance(x, Term):
        return float(x) if isinstance(x, (int, float)) else None
    if x.is_pairwise and not is_filled(x.node):
        return None  # cheaper to read than to compute
    known = constant(x, constants)
    return float(known[1].reshape(-1)[0]) if known and not known[0] else None


def zero(term: Term, constants: Constants) -> Additive | None:
    return NOTHING if number(term, constants) == 0 else None


def total(term: Term, constants: Constants) -> Additive | None:
    node = term.node
    if node.target != aten.add.Tensor or node.kwargs:
        return None
    if not all(isinstance(x, fx.Node) for x in node.args):
        return None
    a, b = (additive(operand(term, x), constants) for x in node.args)
    return a + b


def cast(term: Term, constants: Constants) -> Additive | None:
    """Where nothing is added that the cast would round; the lowest number may become -inf."""
    node = term.node
    if node.target != aten._to_copy.default or not node.args[0].meta["val"].is_floating_point():
        return None
    found = additive(Term(node.args[0], term.dims), constants)
    as_it_was = torch.tensor(found.fill, dtype=node.args[0].meta["val"].dtype)
    fill = as_it_was.to(node.meta["val"].dtype).item()
    exact = not found.biases and fill <= lowest(term)
    return Additive(found.conditions, (), fill) if exact else None


def filled(term: Term, constants: Constants) -> Additive | None:
    """``where(condition, x, -inf)``, ``masked_fill(x, condition, -inf)`` and their like."""
    for condition, kept, other in choices(term):
        fill = number(other, constants)
        if fill is None or not fill <= lowest(term):  # nan is not
            continue
        if isinstance(kept, Term):
            rest = additive(kept, constants)
        elif kept == 0:
            rest = NOTHING
        else:
            return None
        same = rest.fill == fill or not rest.conditions
        if not same or (fill != -INF and rest.biases):
            return None
        return Additive((*Reader(constants)(condition), *rest.conditions), rest.biases, fill)
    return None


def choices(term: Term) -> list[tuple[Allowed, object, object]]:
    """(condition, what stands where it holds, what stands elsewhere), read both ways."""
    node = term.node
    if node.target in WHERE:
        condition, yes, no = node.args
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        no, condition, yes = node.args
    else:
        return []
    seen = operand(term, condition)
    yes, no = (operand(term, x) if isinstance(x, fx.Node) else x for x in (yes, no))
    return [(Allowed(seen), yes, no), (Allowed(seen, False), no, yes)]


def triangle(term: Term, constants: Constants) -> Additive | None:
    """``triu(full(-inf), d)`` is -inf where key - query >= d, else 0."""
    node = term.node
    lower = node.target == aten.tril.default
    if not (lower or node.target == aten.triu.default) or term.dims[-2:] != (QUERY, KEY):
        return None
    fill = number(Term(node.args[0], term.dims), constants)
    if fill is None or not fill <= lowest(term):
        return None
    d = node.args[1] if len(node.args) > 1 else 0
    return Additive((Band(-d - 1, None) if lower else Band(None, d - 1),), (), fill)


def values(term: Term, constants: Constants) -> Additive | None:
    """A constant that is 0 in a band and -inf elsewhere."""
    known = constant(term, constants)
    if known is None or known[0] != {KEY, QUERY}:
        return None
    table = flat(term, known[1])
    hidden = table <= lowest(term)
    fills = table[hidden].unique()
    band = band_of(~hidden)
    if band is None or len(fills) > 1 or bool(table[~hidden].any()):
        return None
    return Additive((band,), (), float(fills[0]) if len(fills) else -INF)
