"""Reads a mask: a conjunction of bands, documents and whatever else has to be true.

Nothing is guessed. What cannot be read stays the tensor it is, beside what could be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mosaic.attention.blocks import FULL, Band
from mosaic.masks.conditions import (
    COMPARED,
    Allowed,
    Condition,
    Documents,
    Relative,
    as_queries,
    comparison,
    overlap,
)
from mosaic.masks.constants import Constants, is_filled
from mosaic.masks.terms import KEY, QUERY, Term, bottom, constant, operand, peeled

aten = torch.ops.aten

AND = {
    aten.__and__.Tensor,
    aten.bitwise_and.Tensor,
    aten.logical_and.default,
    aten.mul.Tensor,
}
OR = {aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default}
NOT = {aten.logical_not.default, aten.bitwise_not.default}


@dataclass(frozen=True)
class Reader:
    """Reads boolean tensors; of numbers, whether they are not 0."""

    constants: Constants

    def __call__(self, given: Allowed) -> list[Condition]:
        """What must hold where ``given`` does: all of these, and nothing more."""
        if self.constants.is_long(given.term.node):
            return [given]
        certain = self.certain(given)
        if certain is not None:
            return [] if certain else [given]
        node, term = given.term.node, given.term
        inner = peeled(term, self.constants) or cast(term)
        if inner is not None:
            return self(Allowed(inner, given.positive))
        if node.target in NOT and is_boolean(node):
            return self(Allowed(operand(term, node.args[0]), not given.positive))
        if node.target in (AND if given.positive else OR) and is_boolean(node):
            return [c for x in node.args for c in self(Allowed(operand(term, x), given.positive))]
        if node.target in (OR if given.positive else AND) and is_boolean(node):
            return self.either(given)
        if node.target in COMPARED:
            return self.compared(given)
        if node.target in (aten.tril.default, aten.triu.default):
            return self.triangle(given)
        return self.pattern(given)

    def certain(self, given: Allowed) -> bool | None:
        """Whether ``given`` holds everywhere (True) or nowhere (False)."""
        if given.term.is_pairwise and not is_filled(given.term.node):
            return None  # cheaper to read than to compute
        known = constant(given.term, self.constants)
        if known is None or known[0]:
            return None
        return bool(known[1].any()) == given.positive

    def either(self, given: Allowed) -> list[Condition]:
        """One of two must hold: readable if one is known."""
        sides = [Allowed(operand(given.term, x), given.positive) for x in given.term.node.args]
        for side, other in (sides, sides[::-1]):
            certain = self.certain(side)
            if certain is not None:
                return [] if certain else self(other)
        return self.pattern(given)

    def compared(self, given: Allowed) -> list[Condition]:
        a, b = given.term.node.args
        name = COMPARED[given.term.node.target]
        if name in ("eq", "ne") and not isinstance(b, fx.Node) and b == 0:
            found = self(Allowed(operand(given.term, a), given.positive == (name == "ne")))
            if not any(isinstance(c, Allowed) for c in found):
                return found
        found = comparison(given, self.constants)
        return self.pattern(given) if found == [given] else found

    def triangle(self, given: Allowed) -> list[Condition]:
        """``tril(x, d)`` is x where key - query <= d, else 0."""
        node, term = given.term.node, given.term
        if term.dims[-2:] != (QUERY, KEY):
            return self.pattern(given)
        x, d = node.args[0], node.args[1] if len(node.args) > 1 else 0
        inner = Allowed(Term(x, term.dims))
        lower = node.target == aten.tril.default
        if given.positive:
            return [Band(None, d) if lower else Band(-d, None), *self(inner)]
        if self.certain(inner):
            return [Band(-d - 1, None) if lower else Band(None, d - 1)]
        return self.pattern(given)

    def pattern(self, given: Allowed) -> list[Condition]:
        """The band of a constant whose form is none of the above, from its values."""
        known = constant(given.term, self.constants)
        if known is None or known[0] != {KEY, QUERY}:
            return [given]
        band = band_of(flat(given.term, known[1]).bool() == given.positive)
        return [given] if band is None else [band]


def cast(term: Term) -> Term | None:
    """What is cast without a number becoming 0, or 0 becoming a number."""
    node = term.node
    if node.target != aten._to_copy.default:
        return None
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    kept = after == torch.bool or before == torch.bool
    return Term(node.args[0], term.dims) if kept else None


def is_boolean(node: fx.Node) -> bool:
    """``&`` of numbers is bitwise, and ``mul`` of numbers may underflow."""
    return all(isinstance(x, fx.Node) and x.meta["val"].dtype == torch.bool for x in node.args)


def flat(term: Term, value: Tensor) -> Tensor:
    """A constant that differs along query and key only, as (queries, keys)."""
    rows, columns = term.dims.index(QUERY), term.dims.index(KEY)
    value = value.permute(
        *(d for d in range(value.ndim) if d not in (rows, columns)), rows, columns
    )
    return value.reshape(value.shape[-2:])


def band_of(seen: Tensor) -> Band | None:
    """The band of a boolean (queries, keys), if it is one."""
    rows, columns = seen.shape
    offset = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    if not seen.any():
        return None
    left, right = -int(offset[seen].min()), int(offset[seen].max())
    band = Band(left if left < rows - 1 else None, right if right < columns - 1 else None)
    return band if torch.equal(within(offset, band), seen) else None


def within(offset: Tensor, band: Band) -> Tensor:
    """Whether a key that stands ``offset`` after the query is in the band."""
    seen = torch.ones_like(offset, dtype=torch.bool)
    if band.left is not None:
        seen = seen & (offset >= -band.left)
    if band.right is not None:
        seen = seen & (offset <= band.right)
    return seen


# --- the conjunction ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """Query i sees key j where the band, the documents and every ``allowed`` say so.

    ``biases`` are added to the scores.
    """

    band: Band = FULL
    documents: Documents | None = None
    allowed: tuple[Allowed, ...] = ()
    biases: tuple[Term, ...] = ()


def joined(
    conditions: Sequence[Condition], constants: Constants, biases: tuple[Term, ...] = ()
) -> Mask:
    """All conditions at once; what two of them say alike is said once."""
    band, documents = FULL, None
    allowed: dict[Allowed, None] = {}
    relative = []
    for condition in dict.fromkeys(conditions):
        match condition:
            case Band():
                band = overlap(band, condition)
            case Documents() if documents is None:
                documents = condition
            case Documents():
                allowed[condition.written] = None
            case Relative():
                relative.append(condition)
            case Allowed():
                allowed[condition] = None
    runs = run_positions(documents, constants) if documents else None
    for condition in relative:
        if condition.positions == runs:
            band = overlap(band, condition.band)
        else:
            allowed[condition.written] = None
    return Mask(band, documents, tuple(allowed), biases)


def every_row_sees(found: Mask) -> bool:
    """Whether every query sees at least the key at its own position."""
    documents, band = found.documents, found.band
    same = documents is None or as_queries(documents.keys) == documents.queries
    return same and not found.allowed and (band.left or 0) >= 0 and (band.right or 0) >= 0


def run_positions(documents: Documents, constants: Constants) -> Term | None:
    """The vector whose runs of consecutive numbers are the documents.

    transformers numbers packed texts with ``cumsum(diff(positions) != 1)``. Where that is equal at
    i and j every step between them is 1, so positions[j] - positions[i] is j - i, whatever the
    positions are: ``positions[j] <= positions[i]`` means j <= i.
    """
    numbers = documents.queries
    along, cumsum = numbers.dims.index(QUERY), numbers.node
    if as_queries(documents.keys) != numbers or cumsum.target != aten.cumsum.default:
        return None
    steps, dim = cumsum.args
    ndim = len(numbers.dims)
    if dim % ndim != along or cumsum.kwargs or not is_call(steps, aten.ne.Scalar, 1):
        return None
    diff = steps.args[0]
    if diff.target != aten.diff.default or diff.kwargs or len(diff.args) != 4:
        return None
    x, times, dim, before = diff.args
    if times != 1 or dim % ndim != along or before.meta["val"].shape[along] != 1:
        return None
    return bottom(Term(x, numbers.dims), constants)


def is_call(node: fx.Node, target: object, number: int) -> bool:
    return node.target == target and node.args[1] == number
