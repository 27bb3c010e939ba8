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
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import drop_dead, insert
from mosaic.graph.source import line
from mosaic.losses.heads import SAME, VIEWS, Logits, logits_of, records, step_of
from mosaic.losses.op import TOKEN_LOSSES
from mosaic.losses.steps import encode
from mosaic.partition.context import Context
from mosaic.partition.losses import REDUCTIONS, counted
from mosaic.partition.values import Call
from mosaic.passes.normalize import mark_gradients

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """A loss, and the logits that it is of."""

    loss: Call
    logits: Logits


def raise_loss(graph: fx.Graph, context: Context) -> int:
    losses = graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    ranks = context.world.size
    found = [one for node in losses if (one := read(node)) and one.logits.are_many(ranks)]
    while (free := [one for one in found if is_free(one, found)]) != found:
        found = free
    if not found:
        return 0
    for one in found:
        like = one.loss.like
        with graph.inserting_before(like):
            loss = written(graph, one)
        like.replace_all_uses_with(loss)
        graph.erase_node(like)
        for node in one.logits.path:
            node.meta["is_late"] = True  # if it is returned
        classes = one.logits.head.node.meta["val"].shape[-1]
        tokens = one.loss["target"].meta["val"].numel()
        context.notes.append(f"no logits are kept of {tokens} x {classes}: {line(loss)}")
    drop_dead(graph)
    mark_gradients(graph)
    return len(found)


def read(node: fx.Node) -> Found | None:
    """A loss of class numbers with the head behind it."""
    loss = Call(node.target, node.args, node.kwargs, node.meta["val"], node)
    x, target = loss["self"], loss["target"]
    if x.meta["val"].ndim < 2 or target.meta["val"].is_floating_point():
        return None
    logits = logits_of(x, 1, records(node))
    return None if logits is None else Found(loss, logits)


def is_free(one: Found, found: Sequence[Found]) -> bool:
    """Whether logits are read by losses that are raised, and else only returned."""
    known = {n for other in found for n in (*other.logits.path, other.loss.like)}
    users = (user for node in one.logits.path for user in node.users)
    return all(user in known or user.op == "output" for user in users)


# --- writing ------------------------------------------------------------------------------------


def written(graph: fx.Graph, found: Found) -> fx.Node:
    loss, head = found.loss, found.logits.head
    like, target = loss.like, loss["target"]

    def new(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert(graph, like, op, args, kwargs)

    hidden = rows(graph, found)
    weight = new(aten.t.default, head.weight) if head.is_turned else head.weight
    flat = new(aten.reshape.default, target, [-1]) if target.meta["val"].ndim > 1 else target
    steps = encode(tuple(step for x in found.logits.between if (step := step_of(x))))
    ignored, smoothing = loss["ignore_index"], loss["label_smoothing"]
    both = new(TOKEN_LOSSES, hidden, weight, head.bias, flat,
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
    loss, head = found.loss.like, found.logits.head
    x, dim = head.hidden, head.hidden.meta["val"].shape[-1]
    for node in found.logits.between:
        if step_of(node) is not None or node.target in SAME:
            continue
        args = node.args[1:]
        if node.target in VIEWS:
            x = insert(graph, loss, aten.reshape.default, (x, [*args[0][:-1], dim]))
        else:
            x = insert(graph, loss, node.target, (x, *args), dict(node.kwargs))
    if x.meta["val"].ndim == 2:
        return x
    order = [d for d in range(x.meta["val"].ndim) if d != 1]
    x = insert(graph, loss, aten.permute.default, (x, [*order, 1]))
    return insert(graph, loss, aten.reshape.default, (x, [-1, dim]))
