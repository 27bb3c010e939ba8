"""Where logits come from: a product of hidden states and a head, and what is done to each token's.

logits = view(to(linear(hidden, weight, bias), float32), -1, classes)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from mosaic.losses.steps import Step

aten = torch.ops.aten
#: Fewer logits than these on a rank (32 MiB in bfloat16) are no burden.
LEAST = 2**24
NUMBERS = {aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div",
           aten.div.Scalar: "div"}  # fmt: skip
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
SAME = (aten.clone.default, aten.alias.default)
PRODUCTS = (aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Head:
    """``linear(hidden, weight, bias)``; ``weight``: as (dim, classes) if ``is_turned``."""

    node: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_turned: bool


@dataclass(frozen=True)
class Logits:
    """A head, what is done to its logits from then on, and where the classes are at the end."""

    head: Head
    between: tuple[fx.Node, ...]

    @property
    def path(self) -> tuple[fx.Node, ...]:
        return (self.head.node, *self.between)

    def are_many(self, ranks: int) -> bool:
        hidden, logits = (n.meta["val"].shape for n in (self.head.hidden, self.head.node))
        return are_many(prod(hidden[:-1]), hidden[-1], logits[-1], ranks)


def are_many(tokens: int, dim: int, classes: int, ranks: int) -> bool:
    """Whether it pays to do without logits: they are larger than hidden states, and many."""
    return classes > dim and tokens * classes >= LEAST * ranks


def logits_of(x: fx.Node, dim: int, grad: bool) -> Logits | None:
    """How ``x``, with classes in ``dim``, comes from a head; None where it does not, or where a
    gradient is not recorded on the way as it is behind it (``grad``)."""
    between: list[fx.Node] = []
    while records(x) == grad:
        head = head_of(x)
        if head is not None:
            return Logits(head, tuple(between)) if dim == x.meta["val"].ndim - 1 else None
        before = class_dim_before(x, dim)
        if before is None:
            return None
        between.insert(0, x)
        x, dim = x.args[0], before
    return None


def records(x: fx.Node) -> bool:
    """Whether gradients were recorded where ``x`` was made."""
    modes = x.meta.get("modes")
    return modes is None or modes.grad


def head_of(x: fx.Node) -> Head | None:
    """The product that gives logits, if ``x`` is one."""
    if x.kwargs:
        return None
    if x.target == aten.linear.default:
        head = Head(x, x.args[0], x.args[1], x.args[2] if x.args[2:] else None, False)
    elif x.target in PRODUCTS:
        head = Head(x, x.args[0], x.args[1], None, True)
    elif x.target == aten.addmm.default:
        head = Head(x, x.args[1], x.args[2], x.args[0], True)
    else:
        return None
    ndims = [n.meta["val"].ndim for n in (head.hidden, head.weight)]
    has_own_bias = head.bias is None or head.bias.meta["val"].ndim == 1
    return head if ndims[0] > 1 and ndims[1] == 2 and has_own_bias else None


def class_dim_before(x: fx.Node, dim: int) -> int | None:
    """Where the classes are in the operand of ``x``, which has them in ``dim``; None where ``x``
    is nothing that each token's hidden state could go through as well."""
    first = x.args[0] if x.op == "call_function" and x.args else None
    if not isinstance(first, fx.Node) or not isinstance(first.meta["val"], torch.Tensor):
        return None
    before, after = first.meta["val"].shape, x.meta["val"].shape
    if step_of(x) is not None or x.target in SAME:
        return dim
    if x.target in VIEWS:
        is_last = dim == len(after) - 1 and before[-1:] == after[-1:]
        return len(before) - 1 if is_last else None
    if x.target == aten.slice.Tensor:
        along = x.args[1] if x.args[1:] else 0
        return None if along % len(before) == dim else dim
    if x.target == aten.transpose.int:
        a, b = (d % len(before) for d in x.args[1:])
        return {a: b, b: a}.get(dim, dim)
    if x.target == aten.permute.default:
        return x.args[1][dim] % len(before)
    return None


def step_of(x: fx.Node) -> Step | None:
    """What is done to each logit, alone."""
    if x.target == aten._to_copy.default and x.kwargs.keys() == {"dtype"}:
        to = x.kwargs["dtype"]
        return Step("to", str(to).removeprefix("torch.")) if to.is_floating_point else None
    if x.target == aten.tanh.default:
        return Step("tanh")
    if x.target in NUMBERS and not x.kwargs and isinstance(x.args[1], (int, float)):
        return Step(NUMBERS[x.target], str(float(x.args[1])))
    return None
