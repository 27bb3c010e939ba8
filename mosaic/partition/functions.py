"""The user's own ``torch.autograd.Function``: kept whole, with both of its bodies."""

from __future__ import annotations

from typing import Any

from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value
from mosaic.runtime.autograd_functions import AUTOGRAD_FUNCTIONS


def call_autograd_function(number: int, *tensors: Any) -> Any:
    """Stands in local programs for the user's call: forward and backward are the user's."""
    out = AUTOGRAD_FUNCTIONS.run(number, tensors)
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def autograd_function(s: ShardingInterpreter, c: Call) -> tuple[Value, ...]:
    """What it computes is not known to be local: it runs whole on every rank."""
    if any(v.place for v in c["tensors"]):
        c = s.with_whole_operands(c, "is a user's autograd.Function, of which nothing is known")
    several = s.function(c, call_autograd_function, (c["number"], *c["tensors"]), c.val)
    items = [s.emitter.item(several.node, i) if s.emitter else None for i in range(len(c.val))]
    return tuple(Value(v, None, n) for v, n in zip(c.val, items, strict=True))
