"""Asks where one op's result is when its operands are at some places, and whether that is local."""

from __future__ import annotations

from typing import Any

from torch import fx

from mosaic.layout import Place
from mosaic.partition.interpreter import Rules, ShardingInterpreter
from mosaic.partition.values import Axis, Call, Value, places_of, recipe


class NotLocalError(Exception):
    """A probe met a collective: the op is not local under these places."""


class Prober(ShardingInterpreter):
    """Raises NotLocalError where anything would be sent."""

    def record(self, op: str, val: Any, why: str, like: fx.Node | None) -> None:
        raise NotLocalError

    def say_gathered(self, name: str, why: str, like: fx.Node, operands: list[Value]) -> None:
        raise NotLocalError

    def with_whole_operands(self, call: Call, reason: str) -> Call:
        raise NotLocalError


def probe(axis: Axis, rules: Rules, node: fx.Node, places: dict[fx.Node, Place]) -> Any:
    """The place of ``node``'s result when its operands have these places; None if not local."""
    prober = Prober(axis, rules)
    prober.env = {n: recipe(n) for n in node.all_input_nodes}
    for n, place in places.items():
        prober.env[n] = Value(n.meta["val"], place)
    try:
        return places_of(prober.value_of(node))
    except NotLocalError:
        return None
