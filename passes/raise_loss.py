"""A head and the cross-entropy of what it gives become one op, and no logits are kept.

    logits = linear(hidden, head)                         (batch, seq, classes)
    loss = cross_entropy(view(logits, -1, classes), labels)
        ->  losses, lse = mosaic.token_losses(view(hidden, -1, dim), head, labels)
            loss = sum(losses) / sum(labels != -100)

Logits are the largest tensor of a training step, and its gradient is as large. Between the two
products may stand casts, scales, a softcap, and views and slices of tokens. Legal because each
token's loss is its own, and where nothing but such losses reads the logits. A model may return
them: ``defer_outputs`` gives a recipe in their place, and they are made when somebody reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import drop_dead, insert
from mosaic.graph.source import line
from mosaic.losses import op as _op  # noqa: F401 - mosaic::token_losses
from mosaic.losses.steps import Step, encode
from mosaic.partition.context import Context
from mosaic.partition.values import Call

aten = torch.ops.aten
#: Fewer logits than these on a rank (32 MiB in bfloat16) are no burden.
LEAST = 2**24
REDUCTIONS = ("none", "mean", "sum")
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
class Found:
    """A loss, the head that it is of, and what stands between them, from the head on."""

    loss: Call
    head: Head
    between: tuple[fx.Node, ...]


def raise_loss(graph: fx.Graph, context: Context) -> int:
    losses = graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    found = [one for node in losses if (one := read(node)) and is_large(one, context)]
    while (free := [one for one in found if is_free(one, found)]) != found:
        found = free
    for one in found:
        with graph.inserting_before(one.loss.like):
            loss = written(graph, one)
        one.loss.like.replace_all_uses_with(loss)
        graph.erase_node(one.loss.like)
        for node in (one.head.node, *one.between):
            node.meta["logits"] = True
        tokens, classes = one.head.hidden.meta["val"].shape[:-1], one.loss["self"].meta["val"].shape
        context.notes.append(
            f"the loss of {prod(tokens)} tokens is made without their {classes[1]} logits each: "
            f"{line(loss)}"
        )
    drop_dead(graph)
    return len(found)


# --- reading ------------------------------------------------------------------------------------


def read(node: fx.Node) -> Found | None:
    """The head behind a loss of class numbers, with the path between them."""
    loss = Call(node.target, node.args, node.kwargs, node.meta["val"], node)
    x, target = loss["self"], loss["target"]
    if x.meta["val"].ndim < 2 or target.meta["val"].is_floating_point():
        return None
    between: list[fx.Node] = []
    dim: int | None = 1  # of the classes
    while (head := head_of(x)) is None:
        dim = class_dim_before(x, dim) if passes_on(x, node) else None
        if dim is None:
            return None
        between.insert(0, x)
        x = x.args[0]
    is_last = dim == x.meta["val"].ndim - 1
    return Found(loss, head, tuple(between)) if is_last and passes_on(x, node) else None


def head_of(x: fx.Node) -> Head | None:
    """The product that gives logits, if ``x`` is one."""
    if x.target == aten.linear.default:
        hidden, weight, bias, *_ = (*x.args, None)
        head = Head(x, hidden, weight, bias, is_turned=False)
    elif x.target in PRODUCTS:
        head = Head(x, *x.args, bias=None, is_turned=True)
    elif x.target == aten.addmm.default and not x.kwargs:
        head = Head(x, *x.args[1:], bias=x.args[0], is_turned=True)
    else:
        return None
    ndims = [n.meta["val"].ndim for n in (head.hidden, head.weight)]
    has_own_bias = head.bias is None or head.bias.meta["val"].ndim == 1
    return head if ndims[0] > 1 and ndims[1] == 2 and has_own_bias else None


def passes_on(x: Any, loss: fx.Node) -> bool:
    """Whether ``x`` recorded gradients as its loss does."""
    modes, others = (n.meta.get("modes") for n in (x, loss))
    return modes is None or others is None or modes.grad == others.grad


def class_dim_before(x: fx.Node, dim: int) -> int | None:
    """Where the classes are in the operand of ``x``, which has them in ``dim``; None where ``x``
    is nothing that each token's hidden state could go through as well."""
    if x.op != "call_function" or not x.args or not isinstance(x.args[0], fx.Node):
        return None
    before, after = x.args[0].meta["val"].shape, x.meta["val"].shape
    if step_of(x) is not None or x.target in SAME:
        return dim
    if x.target in VIEWS:
        is_last = dim == len(after) - 1 and before[-1:] == after[-1:]
        return len(before) - 1 if is_last else None
    if x.target == aten.slice.Tensor:
        return None if x.args[1] % len(before) == dim else dim
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
    if x.target in NUMBERS and isinstance(x.args[1], (int, float)):
        return Step(NUMBERS[x.target], str(float(x.args[1])))
    return None


def is_large(found: Found, context: Context) -> bool:
    logits, hidden = (n.meta["val"] for n in (found.head.node, found.head.hidden))
    classes = logits.shape[-1]
    return classes > hidden.shape[-1] and logits.numel() >= LEAST * context.world.size


def is_free(one: Found, found: Sequence[Found]) -> bool:
    """Whether logits are read by losses that are raised, and else only returned."""
    path = (one.head.node, *one.between)
    known = {n for other in found for n in (*other.between, other.loss.like)}
    return all(user in known or user.op == "output" for node in path for user in node.users)


# --- writing ------------------------------------------------------------------------------------


def written(graph: fx.Graph, found: Found) -> fx.Node:
    loss, head = found.loss, found.head
    like, target = loss.like, loss["target"]

    def new(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert(graph, like, op, args, kwargs)

    hidden = rows(graph, found)
    weight = new(aten.t.default, head.weight) if head.is_turned else head.weight
    flat = new(aten.reshape.default, target, [-1]) if target.meta["val"].ndim > 1 else target
    steps = encode(tuple(step for x in found.between if (step := step_of(x))))
    ignored, smoothing = loss["ignore_index"], loss["label_smoothing"]
    both = new(torch.ops.mosaic.token_losses.default, hidden, weight, head.bias, flat,
               loss["weight"], steps, ignored, smoothing)  # fmt: skip
    losses = insert(graph, like, operator.getitem, (both, 0), name="losses")
    reduction, dtype = REDUCTIONS[loss["reduction"]], loss.val.dtype
    if reduction == "none":
        out = new(aten.reshape.default, losses, list(loss.val.shape))
    else:
        out = new(aten.sum.default, losses)
    if reduction == "mean":
        out = new(aten.div.Tensor, out, counted(new, flat, ignored, loss["weight"]))
    return out if out.meta["val"].dtype == dtype else new(aten._to_copy.default, out, dtype=dtype)


def rows(graph: fx.Graph, found: Found) -> fx.Node:
    """Hidden states (tokens, dim) of the loss's tokens: they go through the views between."""
    loss, x = found.loss.like, found.head.hidden
    dim, classes = (n.meta["val"].shape[-1] for n in (x, found.head.node))
    for node in found.between:
        if step_of(node) is not None or node.target in SAME:
            continue
        args = node.args[1:]
        if node.target in VIEWS:
            shape = [*args[0][:-1], dim if args[0][-1] in (classes, -1) else args[0][-1]]
            x = insert(graph, loss, aten.reshape.default, (x, shape))
        else:
            x = insert(graph, loss, node.target, (x, *args), dict(node.kwargs))
    if x.meta["val"].ndim == 2:
        return x
    order = [d for d in range(x.meta["val"].ndim) if d != 1]
    x = insert(graph, loss, aten.permute.default, (x, [*order, 1]))
    return insert(graph, loss, aten.reshape.default, (x, [-1, dim]))


def counted(new: Any, target: fx.Node, ignored: int, weight: fx.Node | None) -> fx.Node:
    """What a mean divides by: targets that are not ignored, or the sum of their class weights."""
    used = new(aten.ne.Scalar, target, ignored)
    if weight is None:
        return new(aten.sum.default, used)
    classes = new(aten.where.ScalarOther, used, target, 0)
    weights = new(aten.embedding.default, new(aten.unsqueeze.default, weight, 1), classes)
    weights = new(aten.squeeze.dim, weights, -1)
    return new(aten.sum.default, new(aten.mul.Tensor, weights, used))
