"""Losses: sums over the local targets and their global count, never a mean of local means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(s: ShardingInterpreter, c: Call) -> Value:
    """``(tokens, classes)`` or ``(batch, classes, ...)`` against class numbers or probabilities."""
    x, target = c.x, c["target"]
    if c["weight"] is not None:
        c = c.replaced(
            {"weight": s.gather_aloud(c["weight"], "is the weights of all classes", c.like)}
        )
    if x.place is None and target.place is None:
        return s.emit(c, None, enter=False)
    classes = 0 if x.ndim == 1 else 1
    probabilities = target.val.is_floating_point()
    shift = 0 if probabilities else 1
    place = x.place or target.cut.at(target.cut.dim + shift * (target.cut.dim >= classes))
    if place.dim == classes:
        return s.gather_for(c, "needs its classes whole")
    there = place if probabilities else place.at(place.dim - (place.dim > classes))
    x, target = s.at(x, place), s.at(target, there)
    reduction = REDUCTIONS[c["reduction"]]
    if reduction == "none":
        return s.emit(c, there if not probabilities else place.at(place.dim - (place.dim > 1)),
                      self=x, target=target)  # fmt: skip
    local = s.emit(c, None, self=x, target=target, reduction=REDUCTIONS.index("sum"))
    loss = s.sum_across(local, c, "sum of the losses")
    if reduction == "sum":
        return loss
    if probabilities:
        return s.call(c, aten.div.Tensor, loss, target.val.numel() // x.shape[classes])
    count = counted(partial(s.call, c), target, c["ignore_index"], c["weight"])
    return s.call(c, aten.div.Tensor, loss, count)


def token_losses(s: ShardingInterpreter, c: Call) -> Any:
    """``(tokens, dim)`` and a head: tokens are free, each rank has the whole head."""
    hidden, target = c["hidden"], c["target"]
    whole = {
        name: s.gather_aloud(c[name], "is needed for every token", c.like)
        for name in ("head", "bias", "weight")
        if c[name] is not None
    }
    c = c.replaced(whole)
    place = hidden.place or (target.place and target.cut.at(0))
    if place is None:
        return s.emit(c, None, enter=False)
    if place.dim:
        return s.gather_for(c, "needs its hidden states whole")
    return s.emit(c, (place, place), hidden=s.at(hidden, place), target=s.at(target, place))


def counted(call: Callable[..., Any], target: Any, ignored: int, weight: Any) -> Any:
    """What a mean divides by: targets that are not ignored, or the sum of their class weights.
    ``call(op, ...)``: how an op is written."""
    used = call(aten.ne.Scalar, target, ignored)
    if weight is None:
        return call(aten.sum.default, used)
    classes = call(aten.where.ScalarOther, used, target, 0)
    weights = call(aten.unsqueeze.default, weight, 1)
    weights = call(aten.embedding.default, weights, classes)
    weights = call(aten.squeeze.dim, weights, -1)
    return call(aten.sum.default, call(aten.mul.Tensor, weights, used))
