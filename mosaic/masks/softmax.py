"""What stands between an attention's two products: read from the softmax down and up.

    scores -> * scale -> tanh, * cap -> + bias -> masked_fill(hidden, -inf) -> softmax -> dropout

Each step on the way is one reader here. A hidden score may be a low finite number in place of -inf.
It then differs in a row that hides every key: there all weights are equal. (A seen score below
``LOW`` would differ, too; none is.)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import fx

from mosaic.attention import tiles
from mosaic.attention.tiles import Ref, TileProgram
from mosaic.masks.additive import INF, choices, number
from mosaic.masks.constants import Constants
from mosaic.masks.products import PRODUCTS, SWAPPED, Operand, Scores, scores
from mosaic.masks.terms import RESHAPED, Term, broadcast, permutation

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
COPIED = (aten.clone.default, aten.contiguous.default, aten.alias.default)
PARTS = (aten.slice.Tensor, aten.select.int)
MAXIMA = (aten.amax.default, aten.max.dim)
HALF = (torch.bfloat16, torch.float16)
LOW = -1e4


@dataclass(frozen=True)
class Step:
    """A tensor that the scores meet while these are their leading dims, and what it does.
    ``scale``: of a bias, by which it was multiplied with the scores."""

    node: fx.Node
    lead: tuple[int, ...]
    how: Any
    scale: float = 1.0

    @property
    def own_lead(self) -> tuple[int, ...]:
        return tuple(self.node.meta["val"].shape[:-2])

    @property
    def is_broadcast(self) -> bool:
        """Whether it is the same for all batches and heads."""
        return prod(self.own_lead) == 1


@dataclass(frozen=True)
class Masked:
    """Scores, and what was done to them until the softmax.

    ``lead``: the product's leading dims. ``factors``: of rows, for mul or div. ``bends``: the steps
    of a score program (a softcap) behind these. ``biases``: for add or sub. ``seen``: bools that
    are True (or False, as ``how`` says) where a score is kept; elsewhere it is ``fill``.
    ``is_late``: some of the biases were added to what is filled, too. ``lessened``: by a number for
    each row.
    """

    product: Scores
    lead: tuple[int, ...]
    scale: float = 1.0
    factors: tuple[Step, ...] = ()
    bends: tuple[tiles.Step, ...] = ()
    biases: tuple[Step, ...] = ()
    seen: tuple[Step, ...] = ()
    fill: float = -INF
    is_late: bool = False
    lessened: bool = False

    @property
    def is_masked(self) -> bool:
        return bool(self.biases or self.seen)

    def bent(self, op: str, *args: Any) -> Masked:
        """With one step more of the score program."""
        return replace(self, bends=(*self.bends, tiles.Step(op, (Ref(len(self.bends)), *args))))

    @property
    def scores(self) -> str:
        """The score program, that has no leaves; "" where there is none."""
        dtype = self.product.q.node.meta["val"].dtype
        return str(TileProgram(self.bends, dtype)) if self.bends else ""

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.factors, *self.biases, *self.seen)


@dataclass(frozen=True)
class Weights:
    """Weights: the softmax of ``scores``, with dropout; 0 where ``seen`` does not hold, or
    (``is_safe``) where a row hides every key. ``left_out``: the softmax's first column (0) or its
    last (-1), which is none of them."""

    scores: fx.Node
    dropout: float = 0.0
    seen: Step | None = None
    is_safe: bool = False
    left_out: int | None = None


# --- up: from the softmax to the product with the values ------------------------------------------


def weights(node: fx.Node) -> Weights | None:
    """The softmax that ``node`` is made of."""
    found = made_of(node) if node.op == "call_function" and not ends_gradient(node) else None
    if found is None or (found.dropout and len(node.users) > 1):
        return None  # what else reads them would see others dropped
    return found


def made_of(node: fx.Node) -> Weights | None:
    if node.target in SOFTMAX:
        is_safe = node.target == aten._safe_softmax.default
        fits = along_last(node) and keeps_dtype(node)
        return Weights(node.args[0], is_safe=is_safe) if fits else None
    if node.target in COPIED or is_cast_to_half(node) or keeps_rows(node):
        return weights(node.args[0])
    if node.target == aten.dropout.default:
        found, rate = weights(node.args[0]), node.args[1] if node.args[2] else 0.0
        if found is None or (rate and found.dropout):
            return None
        return replace(found, dropout=rate or found.dropout)
    if node.target == aten.slice.Tensor:
        found, side = weights(node.args[0]), side_left_out(node)
        if found is None or found.left_out is not None or side is None:
            return None
        return replace(found, left_out=side)
    for condition, kept, other in choices(broadcast(node, node.meta["val"].ndim)):
        found = weights(kept.node) if other == 0 and isinstance(kept, Term) else None
        if found is not None and not found.seen:
            return replace(found, seen=step(node, condition.term.node, condition.positive))
    return None


def side_left_out(node: fx.Node) -> int | None:
    """Which one column a slice leaves out: the first (0) or the last (-1)."""
    x, dim, start, stop, step = (*node.args, None, None, None)[:5]
    *lead, n = x.meta["val"].shape
    if dim % (len(lead) + 1) != len(lead):
        return None
    return {range(n - 1): -1, range(1, n): 0}.get(range(n)[start:stop:step])


# --- down: from the softmax to the product of queries and keys ------------------------------------


@dataclass(frozen=True)
class ScoresReader:
    """``reader(node)``: what ``node`` is made of, if it is the scores of an attention."""

    constants: Constants
    known: dict[fx.Node, Masked | None] = field(default_factory=dict)

    def __call__(self, node: object) -> Masked | None:
        if not isinstance(node, fx.Node) or node.op != "call_function" or ends_gradient(node):
            return None
        if node not in self.known:
            is_long = self.constants.is_long(node)
            self.known[node] = None if is_long else self.read(node)
        return self.known[node]

    def read(self, node: fx.Node) -> Masked | None:
        product = scores(node)
        if product is not None:
            bias = () if product.bias is None else (step(node, product.bias, aten.add.Tensor),)
            lead = tuple(node.meta["val"].shape[:-2])
            q, k = of_half(product.q), of_half(product.k)
            if q and k:
                product = replace(product, q=q, k=k)
            return Masked(product, lead, scale=product.scale, biases=bias)
        if node.target in COPIED or is_cast_from_half(node) or keeps_rows(node):
            return self(node.args[0])
        readers = (self.scaled, self.capped, self.multiplied, self.lessened, self.added)
        return next(
            (x for x in (read(node) for read in (*readers, self.filled)) if x is not None), None
        )

    def scaled(self, node: fx.Node) -> Masked | None:
        """By a number, with the biases that are there (Falcon), before anything is filled."""
        if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) or node.kwargs:
            return None
        x, factor = node.args
        if isinstance(factor, fx.Node) and not factor.meta["val"].ndim:
            factor = number(Term(factor, ()), self.constants)
        found = self(x) if isinstance(factor, (int, float)) else None
        if found is None or found.seen or (factor == 0 and node.target == aten.div.Tensor):
            return None
        if found.biases and factor <= 0:  # a low number would be a high one
            return None
        factor = 1 / factor if node.target == aten.div.Tensor else factor
        if found.bends:
            return None if found.biases else found.bent("mul.Tensor", float(factor))
        biases = tuple(replace(bias, scale=bias.scale * factor) for bias in found.biases)
        return replace(found, scale=found.scale * factor, biases=biases)

    def capped(self, node: fx.Node) -> Masked | None:
        """``cap * tanh(scores / cap)``, before there is a mask: the scale has what is inside."""
        found = self(node.args[0]) if node.target == aten.tanh.default else None
        return None if found is None or found.is_masked else found.bent("tanh")

    def multiplied(self, node: fx.Node) -> Masked | None:
        """By a tensor that is the same for all keys: a temperature, a scale for each head."""
        if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
            return None
        for x, factor in operands(node, swap=node.target == aten.mul.Tensor):
            found = self(x) if is_of_rows(factor) else None
            if found is None or found.is_masked or found.bends or not like(node, x):
                continue
            if like(node, found.product.q.node, same_shape=False):
                return replace(found, factors=(*found.factors, step(node, factor, node.target)))
        return None

    def lessened(self, node: fx.Node) -> Masked | None:
        """By each row's maximum: a softmax stays the same."""
        found = self(node.args[0]) if is_lessened(node) else None
        return found and replace(found, lessened=True)

    def added(self, node: fx.Node) -> Masked | None:
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            return None
        for x, bias in operands(node, swap=node.target == aten.add.Tensor):
            found = self(x) if like(node, x) else None
            if found is None:
                continue
            if not (is_wide(node) or like(node, found.product.q.node, same_shape=False)):
                continue
            biases = (*found.biases, step(node, bias, node.target))
            return replace(found, biases=biases, is_late=found.fill > -INF)
        return None

    def filled(self, node: fx.Node) -> Masked | None:
        """``where`` or ``masked_fill`` with a number that hides what is there."""
        for condition, kept, other in choices(broadcast(node, node.meta["val"].ndim)):
            fill = number(other, self.constants)
            if fill is None or not fill <= LOW or not isinstance(kept, Term):
                continue
            found = self(kept.node)
            if found is None or found.is_late or not like(node, kept.node):
                continue
            if found.seen and found.fill != fill:
                continue
            seen = step(node, condition.term.node, condition.positive)
            return replace(found, seen=(*found.seen, seen), fill=fill)
        return None


#: What is said of such a softmax.
UNKNOWN = "a softmax between products is not recognised as an attention"


def unread_softmax(graph: fx.Graph) -> fx.Node | None:
    """One that looks like an attention's: a product reads it, or what is made of it."""
    for node in graph.nodes:
        behind = {user.target for reader in node.users for user in (reader, *reader.users)}
        if node.target in SOFTMAX and behind.intersection(PRODUCTS):
            return node
    return None


# --- what a step may be ---------------------------------------------------------------------------


def step(node: fx.Node, x: fx.Node, how: Any) -> Step:
    return Step(x, tuple(node.meta["val"].shape[:-2]), how)


def ends_gradient(node: fx.Node) -> bool:
    """Whether it was made under ``no_grad``, and read where gradients are recorded."""
    modes = node.meta.get("modes")
    if modes is None or modes.grad:
        return False
    return any(user.meta["modes"].grad for user in node.users if "modes" in user.meta)


def operands(node: fx.Node, swap: bool) -> list[tuple[fx.Node, fx.Node]]:
    x, y = node.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return []
    return [(x, y), (y, x)] if swap else [(x, y)]


def is_of_rows(x: fx.Node) -> bool:
    """The same number for all keys."""
    return tuple(x.meta["val"].shape[-1:]) in ((), (1,))


def is_lessened(node: fx.Node) -> bool:
    """Whether a node is scores less each row's maximum."""
    if node.target != aten.sub.Tensor or node.kwargs:
        return False
    x, largest = node.args
    return is_maximum(largest, x) and like(node, x)


def is_maximum(node: Any, x: Any) -> bool:
    """Whether ``node`` is the largest of each row of x."""
    while isinstance(node, fx.Node) and node.target in (aten.detach.default, operator.getitem):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in MAXIMA or node.args[0] is not x:
        return False
    dims, ndim = node.args[1], node.args[0].meta["val"].ndim
    keeps = len(node.args) > 2 and node.args[2]
    return keeps and [d % ndim for d in (dims if isinstance(dims, list) else [dims])] == [ndim - 1]


def like(node: fx.Node, x: fx.Node, same_shape: bool = True) -> bool:
    a, b = node.meta["val"], x.meta["val"]
    return a.dtype == b.dtype and (not same_shape or a.shape == b.shape)


def along_last(node: fx.Node) -> bool:
    return node.args[1] % node.meta["val"].ndim == node.meta["val"].ndim - 1


def keeps_rows(node: fx.Node) -> bool:
    """A view of the leading dims alone: batches and heads folded into one dim, or apart again."""
    if node.target not in (*RESHAPED, aten.expand.default) or node.target in PARTS:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    if node.target == aten.expand.default:
        return before == after
    return len(before) > 2 and len(after) > 2 and before[-2:] == after[-2:]


def dtypes(node: fx.Node) -> tuple[torch.dtype, torch.dtype]:
    return node.args[0].meta["val"].dtype, node.meta["val"].dtype


def keeps_dtype(softmax: fx.Node) -> bool:
    """Or works in float32 on halves, as kernels do."""
    before, after = dtypes(softmax)
    return before == after or (before in HALF and after == torch.float32)


def of_half(x: Operand) -> Operand | None:
    """What was cast to float32 for the product, as kernels do in any case."""
    node, order = x.node, x.order
    if node.target in SWAPPED:
        inner = permutation(node)
        node, order = node.args[0], tuple(d if d is None else inner[d] for d in order)
    return Operand(node.args[0], order) if is_cast_from_half(node) else None


def is_wide(node: fx.Node) -> bool:
    """In float32; so are scores of halves where a bias is added to a cast of them."""
    return bool(node.meta["val"].dtype == torch.float32)


def is_cast_from_half(node: fx.Node) -> bool:
    return is_cast(node) and dtypes(node)[0] in HALF and dtypes(node)[1] == torch.float32


def is_cast_to_half(node: fx.Node) -> bool:
    return is_cast(node) and dtypes(node)[1] in HALF and dtypes(node)[0] == torch.float32


def is_cast(node: fx.Node) -> bool:
    return node.target == aten._to_copy.default and set(node.kwargs) <= {"dtype"}
