"""TRL's fused LM head, which computes log-probabilities in tiles of its own: on a rank's rows."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from mosaic.runtime.collectives import divide_gradient, enter
from mosaic.runtime.deferred_tensor import DeferredTensor
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, part_of, wrapped


def take_parts() -> None:
    """Let TRL's head, if TRL is in use, take hidden states that are cut."""
    utils: Any = sys.modules.get("trl.trainer.utils")
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None or isinstance(function, OnParts):
        return
    utils._ChunkedLogProbFunction = OnParts(function)
    # On GPUs it picks the tokens that have labels, which are others on each rank. The rest gets a
    # zero afterwards, as on CPUs.
    utils._use_triton = lambda device: False


class OnParts:
    """A function of autograd over rows (tokens), each by itself, with a weight that all share."""

    def __init__(self, function: Any):
        self.function = function

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
    ) -> tuple[Tensor | None, ...]:
        if not isinstance(hidden, ShardedTensor):
            found: tuple[Tensor | None, ...] = self.function.apply(
                hidden, weight, bias, targets, *options
            )
            return found
        weight, bias = shared(weight, hidden), None if bias is None else shared(bias, hidden)
        labels = targets.made() if isinstance(targets, DeferredTensor) else targets
        labels = part_of(labels, hidden.places)
        found = self.function.apply(hidden.local, weight, bias, labels, *options)
        shape, places = targets.shape, hidden.places
        return tuple(None if x is None else wrapped(x, shape, places) for x in found)


def shared(weight: Tensor, hidden: ShardedTensor) -> Tensor:
    """What all ranks have: its gradient is the sum over those that share the rows.

    TRL joins what FSDP2 has cut by itself, where nobody averages over replicas.
    """
    ranks, is_joined = get_context(), not weight.is_leaf
    for place in hidden.places:
        weight = enter(weight, ranks.group_name(place.mesh_axis))
    if is_joined and ranks.dp_size > 1:
        weight = enter(divide_gradient(weight, ranks.dp_size), ranks.group_name("dp"))
    return weight
