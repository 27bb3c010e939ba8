"""What is deferred in eager code: boolean and integer patterns of positions, ids and padding.

ids[:, :, None] == ids[:, None, :]        # of a ShardedTensor: n x n, so it is not made
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mosaic.graph.ops import makes_patterns
from mosaic.runtime.deferred_tensor import NOTHING, DeferredTensor, Step, is_making, joined
from mosaic.torch_private import pytree, without_modes

aten = torch.ops.aten
SAME_MEMORY = (aten.detach.default, aten.alias.default)


def deferred(func: Any, args: Any, kwargs: dict[str, Any], is_view: bool) -> DeferredTensor | None:
    """What ``func`` gives as a program, if it is one that may wait; else None."""
    operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    known = [x for x in operands if isinstance(x, DeferredTensor)]
    if is_making() or not (is_view or makes_patterns(func)):
        return None
    if not known and not is_boolean(func):
        return None
    others = [x for x in operands if not isinstance(x, DeferredTensor)]
    if any(x.requires_grad for x in others) or len(func._schema.returns) != 1:
        return None
    with without_modes():
        like = on_meta(func, args, kwargs)
    is_outer = like.numel() >= 2 * max((x.numel() for x in others), default=0)
    is_pattern = bool(known) and not like.dtype.is_floating_point
    if not (is_outer or is_pattern):
        return None
    first = operands[0]
    if func in SAME_MEMORY and isinstance(first, DeferredTensor):  # autograd's, above us
        steps, leaves = first.steps, list(first.current())
    else:
        steps, leaves = joined(func, args, kwargs)
    device = kwargs.get("device") or operands[0].device
    out = DeferredTensor(leaves, like.shape, (steps, like.dtype, device))
    if is_view and isinstance(operands[0], DeferredTensor):
        out.look_at(operands[0])
    return out


def is_boolean(func: Any) -> bool:
    """A comparison: where a pattern begins, if no operand is one."""
    return str(func).split(".")[1] in COMPARISONS


COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and"}


def on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What ``func`` gives, without values."""

    def meta(x: Tensor) -> Tensor:
        return torch.empty([int(n) for n in x.shape], dtype=x.dtype, device="meta")

    args, kwargs = pytree.tree_map_only(Tensor, meta, (args, kwargs))
    found: Tensor = func(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
    return found


class Deferring(TorchFunctionMode):
    """``torch.arange`` of integers gives a pattern: masks are made of it. ``F.linear`` gives what
    ``logits(*args)`` does in its place, if that is something."""

    def __init__(self, logits: Callable[..., Tensor | None]):
        super().__init__()
        self.logits = logits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            late = self.logits(*args, **kwargs)
            return func(*args, **kwargs) if late is None else late
        if func is not torch.arange or "out" in kwargs or kwargs.get("requires_grad"):
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        is_pattern = type(made) is Tensor and made.dtype == torch.int64 and made.numel() > 0
        return positions(made, args, kwargs) if is_pattern else made


def pattern(x: Tensor) -> Tensor:
    """Integers that a model is given (positions, ids) as a pattern: what masks are made of them is
    read with how they were made."""
    if x.dtype != torch.int64 or isinstance(x, DeferredTensor):
        return x
    return DeferredTensor((x,), x.shape, ((), x.dtype, x.device))


def positions(made: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredTensor:
    names = ("end",) if len(args) == 1 else ("start", "end", "step")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    start, step = int(given.get("start", 0)), int(given.get("step", 1))
    options = (("device", made.device), ("dtype", made.dtype))
    end = start + step * math.prod(made.shape)
    steps = (Step(aten.arange.start_step, (start, end, step), options),)
    return DeferredTensor((NOTHING,), made.shape, (steps, made.dtype, made.device))
