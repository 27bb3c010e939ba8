"""A whole value at a place: the slice goes up through the rules to the leaves of its recipe.

Only this rank's part is ever computed; where no rule goes further, the whole is sliced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from mosaic.layout import Place
from mosaic.torch_private import pytree
from mosaic.values import Call, Value, recipe

if TYPE_CHECKING:
    from mosaic.sharder import Sharder


def hoist(s: Sharder, value: Value, place: Place) -> Value:
    """A whole value at a place: recomputed there from its leaves, or sliced where that stops."""
    origin = value.origin
    if not s.writer:
        return Value(value.val, place)
    if s.axis.p == 1:
        return Value(value.val, place, s.node(value))
    if origin is None:
        return s.slice(value, place)
    if (origin, place) not in s.hoisted:
        s.hoisted[origin, place] = recomputed(s, origin, place) or s.slice(value, place)
    return s.hoisted[origin, place]


def recomputed(s: Sharder, origin: fx.Node, place: Place) -> Value | None:
    from mosaic.local.written import HELPERS
    from mosaic.rules import pull

    if origin.op != "call_function" or not hasattr(origin.target, "_schema"):
        return None
    if origin.target in HELPERS:
        return None
    places = pull(s, origin, place)
    if places is None:
        return None
    operands = {n: hoist(s, whole_form(s, n), at) for n, at in places.items()}
    args, kwargs = pytree.tree_map(
        lambda a: (operands.get(a) or whole_form(s, a)) if isinstance(a, fx.Node) else a,
        (origin.args, origin.kwargs),
    )
    call = Call(origin.target, args, kwargs, origin.meta["val"], origin)
    return s.at(s.apply(call) if operands else created(s, call, place), place)


def whole_form(s: Sharder, node: fx.Node) -> Any:
    value = s.env[node]
    return recipe(node) if isinstance(value, Value) and value.origin is not None else value


def created(s: Sharder, call: Call, place: Place) -> Value:
    """zeros, ones, full: made at the local size."""
    return s.emit(call, place, size=s.local(call.val.shape, place))
