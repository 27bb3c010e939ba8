"""Writes this rank's local program: the interpreter that has nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mosaic.graph.ops import is_effect
from mosaic.layout import Place
from mosaic.partition.emitter import Emitter
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.slice_pushdown import hoist, whole
from mosaic.partition.values import Call, Value, map_values, needs_gradient, result_device
from mosaic.runtime import collectives


@dataclass(kw_only=True)
class ProgramWriter(ShardingInterpreter):
    """``emitter`` appends to the graph. ``entered_bytes``: of whole tensors whose gradients are
    summed across in backward."""

    emitter: Emitter
    hoisted: dict[tuple[fx.Node, Place], Value] = field(default_factory=dict)
    pulled: dict[tuple[fx.Node, Place], Any] = field(default_factory=dict)
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)
    entered_bytes: int = 0
    _entered: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _seed: fx.Node | None = None

    # --- nodes of values -------------------------------------------------------------------

    def node(self, value: Value) -> fx.Node:
        if value.node is None:
            assert value.origin is not None
            value.node = whole(self, value.origin)
        return value.node

    def operand(self, value: Value, enter: bool) -> fx.Node:
        if value.place is not None or not enter:
            return self.node(value)
        return self.entered(value)

    def entered(self, value: Value) -> fx.Node:
        """A whole value about to be used by sharded work: its gradient is summed across, once."""
        if self.gives_shares(value):
            return value.origin
        node = self.node(value)
        if not needs_gradient(value) or self.axis.p == 1:
            return node
        if node not in self._entered:
            if self.counts_entered(value):
                self.entered_bytes += value.val.numel() * value.val.element_size()
            entered = self.emitter.function(
                node, collectives.enter, (node, self.emitter.group), name=f"{node.name}_entered"
            )
            self._entered[node] = entered
        return self._entered[node]

    def counts_entered(self, value: Value) -> bool:
        """In an axis's program that is cut again sizes differ by rank, but those of parameters."""
        leaf = value.origin
        while leaf is not None and leaf.target is collectives.enter:
            leaf = leaf.args[0]
        return not self.is_over_shards or (leaf is not None and leaf.op == "placeholder")

    # --- what is written -------------------------------------------------------------------

    def unmoved(self, node: fx.Node) -> Any:
        if is_effect(node):
            whole(self, node)
        return super().unmoved(node)

    def arrived(self, node: fx.Node, place: Place) -> Value:
        val = node.meta["val"]
        node.meta["val"] = val.new_empty(place.local_shape(val.shape, self.emitter.rank))
        return Value(val, place, node)

    def written_nodes(self, call: Call, bound: dict[str, Any], enter: bool) -> Sequence[fx.Node]:
        operands = map_values(lambda v: self.operand(v, enter), call.split(bound))
        node = self.emitter.op(call.like, call.target, *operands)
        if not isinstance(call.val, (tuple, list)):
            return [node]
        return [self.emitter.item(node, i) for i in range(len(call.val))]

    def function(
        self, call: Call, target: Any, args: tuple[Any, ...], val: Any, place: Place | None = None
    ) -> Value:
        nodes = map_values(self.node, args)
        return Value(val, place, self.emitter.function(call.like, target, nodes))

    def take(self, call: Call, x: Value, runs: Any, dim: int) -> fx.Node:
        return self.emitter.take(call.like, self.node(x), runs, dim)

    def on_rank(self, decide: Callable[[int], Any]) -> Any:
        return decide(self.emitter.rank)

    def local(self, shape: Iterable[int], place: Place) -> list[int]:
        return place.local_shape(list(shape), self.emitter.rank)

    def pushed_down(self, value: Value, place: Place) -> Value:
        return hoist(self, value, place)

    def summed_node(self, value: Value, like: fx.Node, op: str) -> fx.Node | None:
        if self.axis.p == 1:
            return value.node
        args = (value.node, self.emitter.group, op)
        return self.emitter.function(like, collectives.sum_across, args, name=f"{op}_across")

    def moved_node(
        self, collective: Any, value: Value, like: Any, *places: Place
    ) -> fx.Node | None:
        if self.axis.p == 1:
            return value.node
        specs = [self.emitter.shard(place) for place in places]
        return self.emitter.function(like, collective, (value.node, *specs))

    def slice(self, value: Value, place: Place) -> Value:
        if self.axis.p == 1:
            return Value(value.val, place, value.node)
        spec = self.emitter.shard(place)
        if self.gives_shares(value):
            leaf = value.origin
            share = self.emitter.function(leaf, collectives.slice_share, (leaf, spec))
            return Value(value.val, place, share)
        node = self.node(value)
        if needs_gradient(value):
            self.record("slice", value.val, "gradient of a whole value that is used in parts", node)
        part = self.emitter.function(node, collectives.slice_to, (node, spec))
        return Value(value.val, place, part)

    # --- random numbers --------------------------------------------------------------------

    def dropout_seed(self, call: Call) -> fx.Node:
        if self._seed is None:
            self._seed = self.emitter.seed(call.like, str(result_device(call)))
        return self._seed

    def seed(self, call: Call) -> Value:
        node = self.dropout_seed(call)
        return Value(node.meta["val"], None, node)
