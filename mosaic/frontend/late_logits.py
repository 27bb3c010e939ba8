"""Logits in the eager code of a parallelized model: they wait, and their loss is made without them.

    logits = F.linear(hidden, head)                     # hidden f64[2, 13/sp, 8]: nothing is made
    F.cross_entropy(logits.view(-1, 29), labels.view(-1))      # mosaic::token_losses, on parts

What a model does to its logits in between (a cast, a softcap, views) grows their program. Anything
else makes them, of each rank's tokens.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mosaic.frontend.eagerly import meet
from mosaic.frontend.op_program import program_of
from mosaic.losses.heads import are_many
from mosaic.partition.losses import REDUCTIONS
from mosaic.runtime import sharded_tensor
from mosaic.runtime.deferred_tensor import EXPIRED, DeferredTensor, Recipe, Ref, step_of
from mosaic.runtime.sharded_tensor import ShardedTensor, is_traced, with_whole_gradient
from mosaic.torch_private import without_torch_function

aten = torch.ops.aten


def late(x: Any, weight: Any, bias: Any = None) -> DeferredTensor | None:
    """``F.linear`` of hidden states that are cut, if it gives many logits; else None."""
    if not isinstance(x, ShardedTensor) or not x.places or is_traced(x):
        return None
    if isinstance(weight, (ShardedTensor, DTensor)) or weight.ndim != 2 or x.ndim < 2:
        return None
    classes, dim = weight.shape
    ranks = prod(place.layout.p for place in x.places)
    if not are_many(x.numel() // max(1, dim), dim, classes, ranks):
        return None
    given = [y for y in (weight, bias) if y is not None]
    leaves = [x, *(with_whole_gradient(y) if y.requires_grad else y.detach() for y in given)]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        leaves = [leaf.to(torch.get_autocast_dtype(device)) for leaf in leaves]
    steps = (step_of(aten.linear.default, tuple(map(Ref, range(len(leaves)))), {}),)
    shape = (*x.shape[:-1], classes)
    return Recipe(steps, (), shape, leaves[0].dtype, x.device).of(leaves)


class Waiting:
    """The heads that logits of a model's last call are made of. FSDP2 gives parameters other values
    behind autograd's back: from the next call on those of the last one cannot be made."""

    def __init__(self) -> None:
        self.heads: list[weakref.ref[Tensor]] = []

    def note(self, logits: DeferredTensor) -> None:
        self.heads += [weakref.ref(x) for x in logits.leaves[1:]]

    def expire(self) -> None:
        for one in self.heads:
            if (head := one()) is not None:
                EXPIRED[head] = True
        self.heads.clear()


def run_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` of logits that wait. Its op has a backward of its own, on this rank's
    parts; as autocast says, it is of float32."""
    if size_average is not None or reduce is not None or reduction not in REDUCTIONS:
        with without_torch_function():
            return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce,
                                   reduction, label_smoothing)  # fmt: skip
    if torch.is_autocast_enabled(input.device.type):
        input = input.float()
    number = REDUCTIONS.index(reduction)
    arguments = (input, target, weight, number, ignore_index, label_smoothing)
    op = aten.cross_entropy_loss.default
    with torch.autocast(input.device.type, enabled=False):
        program = program_of(op, arguments, {})
        if program.waits_for:
            meet(program.waits_for, op)
        loss: Tensor = program.with_history(arguments)
    return loss


sharded_tensor.RUN.update(loss=run_loss)
