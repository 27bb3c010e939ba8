"""Which blocks of 128 queries x 128 keys see nothing, everything or a part, by the least and the
greatest number of each vector in them.

A mask's program is run on those instead of on every pair (interval arithmetic). A block is said to
be empty or full only where it is; where that cannot be told (ids of documents in no order, an op
that is not known here), it is a part, and the kernel computes the mask of its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.structure import Structure
from mosaic.attention.tiles import Ref, Step, TileProgram

BLOCK = 128


class Span(NamedTuple):
    """The least and the greatest number in each block, or less and more: integers (batch|1,
    heads|1, blocks of queries|1, blocks of keys|1) or (), or Python's. Of booleans: whether all
    are true, and whether any is."""

    low: Any
    high: Any

    @property
    def is_bool(self) -> bool:
        return isinstance(self.low, bool) or getattr(self.low, "dtype", None) == torch.bool


#: Of a boolean of which nothing is known.
MAYBE = Span(False, True)


class Blocks(NamedTuple):
    """Whether any pair of a block may be seen, and whether all are: boolean (batch|1, heads|1,
    blocks of queries, blocks of keys)."""

    some: Tensor
    full: Tensor


def blocks_of(mask: Structure, rows: int, keys: int, block: int = BLOCK) -> Blocks:
    """A block that is cut off at the end is never full: the kernel has to look where it ends."""
    spans = [span_of(leaf, block) for leaf in mask.leaves]
    for step in TileProgram.parse(mask.program).steps:
        spans.append(after(step, spans))
    device, found = mask.leaves[0].device, spans[-1] or MAYBE
    ends = [torch.arange(block, n + block, block, device=device) for n in (rows, keys)]
    whole = ((ends[0] <= rows)[:, None] & (ends[1] <= keys))[None, None]
    some = torch.ones_like(whole) & found.high
    return Blocks(some, (whole & found.low).expand(some.shape))


def span_of(leaf: Tensor, block: int) -> Span | None:
    """Of a vector or a number; None for floats, among which a NaN would hide the others, and for
    tables."""
    if leaf.is_floating_point() or leaf.ndim == 2:
        return None
    low = high = leaf.to(torch.uint8) if leaf.dtype == torch.bool else leaf
    for dim in (2, 3) if leaf.ndim else ():
        if leaf.shape[dim] > 1:
            low = by_block(low, dim, block).amin(dim + 1)
            high = by_block(high, dim, block).amax(dim + 1)
    return Span(low != 0, high != 0) if leaf.dtype == torch.bool else Span(low, high)


def by_block(x: Tensor, dim: int, block: int) -> Tensor:
    """A dim as (blocks, block), filled up with its last number."""
    missing = -x.shape[dim] % block
    if missing:
        x = torch.cat([x, x.narrow(dim, -1, 1).repeat_interleave(missing, dim)], dim)
    return x.unflatten(dim, (-1, block))


def after(step: Step, spans: Sequence[Span | None]) -> Span | None:
    """What a step's result lies between; None: anything."""
    name = step.op.partition(".")[0]
    given = [spans[x.number] if isinstance(x, Ref) else Span(x, x) for x in step.args]
    known = [span for span in given if span is not None]
    if name in COMPARED:
        return COMPARED[name](*map(numbers, known)) if len(known) == len(given) else MAYBE
    if name in LOGIC and name.startswith("logical"):
        return LOGIC[name](*(MAYBE if span is None else truth(span) for span in given))
    if len(known) < len(given) or step.kwargs:
        return None
    if name in LOGIC:
        return LOGIC[name](*known) if all(span.is_bool for span in known) else None
    return without_wraps(SUMS[name], known) if name in SUMS else None


def numbers(span: Span) -> Span:
    """True is 1, for what compares."""
    tensors = span.is_bool and isinstance(span.low, Tensor)
    return Span(*(x.to(torch.uint8) for x in span)) if tensors else span


def truth(span: Span) -> Span:
    """Whether numbers are not 0."""
    return span if span.is_bool else negated(equal(span, Span(0, 0)))


def equal(a: Span, b: Span) -> Span:
    all_same = (a.low == b.high) & (a.high == b.low)
    return Span(all_same, (a.low <= b.high) & (b.low <= a.high))


def negated(a: Span) -> Span:
    return Span(*(not x if isinstance(x, bool) else ~x for x in (a.high, a.low)))


def both(a: Span, b: Span) -> Span:
    return Span(a.low & b.low, a.high & b.high)


def either(a: Span, b: Span) -> Span:
    return Span(a.low | b.low, a.high | b.high)


def less(a: Span, b: Span) -> Span:
    return Span(a.high < b.low, a.low < b.high)


COMPARED: dict[str, Callable[[Span, Span], Span]] = {
    "lt": less,
    "gt": lambda a, b: less(b, a),
    "ge": lambda a, b: negated(less(a, b)),
    "le": lambda a, b: negated(less(b, a)),
    "eq": equal,
    "ne": lambda a, b: negated(equal(a, b)),
}
LOGIC: dict[str, Callable[..., Span]] = {
    "logical_and": both,
    "logical_or": either,
    "__and__": both,
    "__or__": either,
    "logical_not": negated,
    "bitwise_and": both,
    "bitwise_or": either,
    "bitwise_not": negated,
}


def magnitude(a: Span) -> Span:
    largest = torch.maximum(a.low.abs(), a.high.abs())
    least = torch.minimum(a.low.abs(), a.high.abs())
    return Span(torch.where((a.low <= 0) & (a.high >= 0), 0, least), largest)


SUMS: dict[str, Callable[..., Span]] = {
    "add": lambda a, b: Span(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: Span(a.low - b.high, a.high - b.low),
    "neg": lambda a: Span(-a.high, -a.low),
    "abs": magnitude,
}


def without_wraps(rule: Callable[..., Span], given: Sequence[Span]) -> Span | None:
    """A rule of integers; all that a dtype can hold where a number might have wrapped in it."""
    if any(span.is_bool for span in given):
        return None
    found = rule(*given)
    limits = torch.iinfo(found.low.dtype)
    most = min(limits.max, 2**62)  # well inside: those of int64 are rounded
    exact = rule(*(Span(*map(float_of, span)) for span in given))
    fits = (exact.low >= max(limits.min, -most)) & (exact.high <= most)
    low = torch.where(fits, found.low, limits.min)
    return Span(low, torch.where(fits, found.high, limits.max))


def float_of(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else float(x)
