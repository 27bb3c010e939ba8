"""Writes the recipe of a whole value: whole, or at a place.

At a place the slice goes up through the rules to the leaves of the recipe: only this rank's part is
ever computed. Where no rule goes further, the whole is sliced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mosaic.layout import Place
from mosaic.partition.values import Call, Value, recipe
from mosaic.runtime import collectives
from mosaic.torch_private import pytree

if TYPE_CHECKING:
    from mosaic.partition.writing import ProgramWriter


def hoist(s: ProgramWriter, value: Value, place: Place) -> Value:
    """A whole value at a place: recomputed there from its leaves, or sliced where that stops."""
    origin = value.origin
    if s.axis.p == 1:
        return Value(value.val, place, s.node(value))
    if origin is None:
        return s.slice(value, place)
    todo = [(origin, place)]
    while todo:  # a recipe may be thousands of ops long: its leaves first
        node, at = todo[-1]
        places = pulled(s, node, at)
        recipes = [
            pair
            for pair in (places or {}).items()
            if getattr(whole_form(s, pair[0]), "origin", None) is not None
        ]
        missing = [pair for pair in recipes if pair not in s.hoisted]
        todo += missing
        if not missing:
            todo.pop()
            if (node, at) not in s.hoisted:
                s.hoisted[node, at] = recomputed(s, node, at, places) or s.slice(recipe(node), at)
    return s.hoisted[origin, place]


def pulled(s: ProgramWriter, origin: fx.Node, place: Place) -> dict[fx.Node, Place] | None:
    """Where operands are cut to have ``origin`` at a place; None: its whole result is sliced."""
    if origin.op != "call_function" or not hasattr(origin.target, "_schema"):
        return None
    if origin.target in s.rules.helpers:
        return None
    if (origin, place) not in s.pulled:
        s.pulled[origin, place] = s.rules.pull(s, origin, place)
    return s.pulled[origin, place]


def recomputed(
    s: ProgramWriter, origin: fx.Node, place: Place, places: dict[fx.Node, Place] | None
) -> Value | None:
    if places is None:
        return None
    operands = {n: hoist(s, whole_form(s, n), at) for n, at in places.items()}
    args, kwargs = pytree.tree_map(
        lambda a: (operands.get(a) or whole_form(s, a)) if isinstance(a, fx.Node) else a,
        (origin.args, origin.kwargs),
    )
    call = Call(origin.target, args, kwargs, origin.meta["val"], origin)
    return s.at(s.apply(call) if operands else created(s, call, place), place)


def whole_form(s: ProgramWriter, node: fx.Node) -> Any:
    value = s.env[node]
    return recipe(node) if isinstance(value, Value) and value.origin is not None else value


def created(s: ProgramWriter, call: Call, place: Place) -> Value:
    """zeros, ones, full: made at the local size."""
    return s.emit(call, place, size=s.local(call.val.shape, place))


# --- whole --------------------------------------------------------------------------------------


def whole(s: ProgramWriter, origin: fx.Node) -> fx.Node:
    """Write a recipe whole, and whatever it needs that is not written yet, in graph order."""
    for node in unwritten(s, origin):
        s.written[node] = write(s, node)
    return s.written[origin]


def unwritten(s: ProgramWriter, origin: fx.Node) -> list[fx.Node]:
    todo, found = [origin], set()
    while todo:
        node = todo.pop()
        value = s.env.get(node)
        if isinstance(value, Value) and value.node is not None and value.place is None:
            s.written[node] = value.node
        elif node not in s.written:
            check_never_cut(s, node, value)
        if node not in found and node not in s.written:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found)


def check_never_cut(s: ProgramWriter, node: fx.Node, value: Any) -> None:
    """A recipe is made of what was never cut. Else every rank would compute all that is before it
    a second time, whole, beside its part, and nothing would say so."""
    values = value if isinstance(value, tuple) else (value,)
    for v in values:
        if isinstance(v, Value) and v.place is not None and v.origin is None and s.axis.p > 1:
            raise AssertionError(f"{node.name} is cut, and was asked for whole as a recipe")


def write(s: ProgramWriter, node: fx.Node) -> fx.Node:
    if s.gives_shares(recipe(node)):  # whole work gives the whole gradient on every rank
        return s.emitter.function(node, collectives.divide_gradient, (node, s.axis.p))
    if node.op != "call_function":
        return node
    special = s.rules.written_whole(node)
    if special:
        value = special(s, s.call_of(node))
        several = isinstance(value, tuple)  # items of one node
        return value[0].node.args[0] if several else s.node(value)
    args, kwargs = pytree.tree_map(
        lambda a: s.written[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
    )
    # A whole attention of ours has other strides than the user's, through which a view went.
    is_view = node.target is torch.ops.aten.view.default
    target = torch.ops.aten.reshape.default if is_view else node.target
    return s.emitter.op(node, target, args, kwargs)
