"""Follows a global program on shards: values with places, and what rules may ask for.

There are several ways to follow one. Rules cannot tell them apart, so what is planned is what is
written, and every decision is a function of global facts.

    ShardingInterpreter   plans: follows places from op to op, notes what would be sent
    Prober                asks whether one op is local with its operands at some places (probing.py)
    ProgramWriter         writes this rank's local program (writing.py)

A value that is whole stays a recipe (its node in the global graph) until it is needed: whole, then
it is written whole; at a place, then only this rank's part is computed (``slice_pushdown.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import UnsupportedError
from mosaic.graph.modes import modes_of
from mosaic.graph.ops import differentiable
from mosaic.graph.source import innermost, line, where
from mosaic.graph.unexpected import blamed_on
from mosaic.layout import Place
from mosaic.partition.emitter import Emitter
from mosaic.partition.values import (
    Axis,
    Call,
    Collective,
    Many,
    Value,
    is_whole,
    map_values,
    needs_gradient,
    places_of,
    recipe,
    result_device,
)
from mosaic.runtime.rng import draw_seed
from mosaic.torch_private import fake_mode_of, pytree


@dataclass(frozen=True)
class Rules:
    """What an interpreter goes by: ``table.py`` has them. ``rule_for`` gives an op's rule,
    ``rule(interpreter, call)``; ``pull`` where operands are cut to have a result at a place;
    ``written_whole`` the rule of an op that even whole is not written as it is; ``follow`` steps
    over what is routed by expert; ``helpers`` over what another axis's program holds, of which some
    are ``collectives``."""

    rule_for: Callable[[Any], Callable[..., Any]]
    pull: Callable[..., dict[fx.Node, Place] | None]
    written_whole: Callable[[fx.Node], Callable[..., Any] | None]
    follow: Callable[..., Any]
    helpers: Mapping[Any, Callable[..., Any]]
    collectives: Collection[Any]


@dataclass
class ShardingInterpreter:
    """Plans. ``emitter`` is for rules that write nodes of their own; None here, where none are."""

    axis: Axis
    rules: Rules
    emitter: Emitter | None = None
    on_gather: str = "warn"
    gradients: str = "whole"
    arriving: dict[fx.Node, Place] = field(default_factory=dict)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    attentions: list[Any] = field(default_factory=list)
    recurrences: list[fx.Node] = field(default_factory=list)  # that the axis cuts in stretches
    gathered: list[tuple[str, fx.Node]] = field(default_factory=list)
    is_over_shards: bool = False  # the nodes are the local program of another axis
    decided: list[str] = field(default_factory=list)  # about the first axis's collectives
    recorded: list[fx.Node | None] = field(default_factory=list)  # where each collective stands
    routed: dict[fx.Node, Any] = field(default_factory=dict)  # sorted by expert: routing.py
    current: fx.Node | None = None  # the global node at hand

    # --- the program -----------------------------------------------------------------------

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Follow every node of the global graph, in order; ``env`` then holds their values."""
        seeds = dict(self.axis.seeds)
        for node in nodes:
            if node.op == "output":
                continue
            self.current = node
            with blamed_on(node):
                self.env[node] = self.keeping_origin(node, self.value_of(node))
                if node.name in seeds:
                    self.env[node] = self.keeping_origin(node, self.seeded(node, seeds[node.name]))

    def seeded(self, node: fx.Node, dim: int) -> Value:
        """Here the axis begins, as a dim of this value."""
        place = Place(self.axis.layout, dim, mesh_axis=self.axis.mesh_axis)
        value: Value = self.env[node]
        return self.at(value, place)

    def keeping_origin(self, node: fx.Node, value: Any) -> Any:
        """Integers (ids, labels, positions) that come from integers keep their recipe beside the
        shard: another part of them is then cut for free, where a reshard would have to send it."""
        if node in self.arriving:  # nobody has the whole
            return value
        if isinstance(value, Value) and value.place and not differentiable(value.val):
            operands = [self.env[n] for n in node.all_input_nodes]
            if all(isinstance(v, Value) and v.origin is not None for v in operands):
                value.origin = node
        return value

    def value_of(self, node: fx.Node) -> Any:
        if node in self.arriving:
            return self.arrived(node, self.arriving[node])
        if node.op != "call_function":
            return recipe(node)
        if node.target is operator.getitem:
            several, index = self.env[node.args[0]], node.args[1]
            return recipe(node) if isinstance(several, Many) else several[index]
        if node in self.routed:
            return self.rules.follow(self, node)
        if node.target is draw_seed:
            return self.helper(node)
        if all(is_whole(self.env[n]) for n in node.all_input_nodes):
            return self.unmoved(node)
        return self.helper(node) or self.apply(self.call_of(node))

    def call_of(self, node: fx.Node) -> Call:
        args, kwargs = self.values((node.args, node.kwargs))
        return Call(node.target, args, kwargs, node.meta["val"], node)

    def unmoved(self, node: fx.Node) -> Any:
        """A node whose operands are all whole."""
        return recipe(node)

    def helper(self, node: fx.Node) -> Any:
        """What another axis's program holds; None for an op."""
        if node.target not in self.rules.helpers:
            return None
        value = self.rules.helpers[node.target](self, node)
        if node.target in self.rules.collectives:
            # By name: plans are compared, and the address of a function differs between ranks.
            name = getattr(node.target, "__name__", node.target)
            self.decided.append(f"{name}: {places_of(value)}")
        return value

    def arrived(self, node: fx.Node, place: Place) -> Value:
        """An input that is this rank's part already."""
        return Value(node.meta["val"], place)

    def values(self, arguments: Any) -> Any:
        return pytree.tree_map(lambda a: self.env[a] if isinstance(a, fx.Node) else a, arguments)

    def apply(self, call: Call) -> Any:
        value = self.rules.rule_for(call.target)(self, call)
        return tuple(value) if isinstance(value, list) else value

    def call(self, like: Call, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run another op in the place of ``like``, by its own rule: so composite rules are."""
        new = Call(target, args, kwargs, None, like.like)
        new.val = self.global_value(new)
        return self.again(new)

    def again(self, call: Call) -> Any:
        """Apply the rule of a call whose operands may be whole by now."""
        if all(v.place is None for v in call.tensors()):
            return self.emit(call, None, enter=False)
        return self.apply(call)

    def global_value(self, call: Call) -> Any:
        args, kwargs = map_values(lambda v: v.val, call.split(call.bound))
        mode = fake_mode_of(args, kwargs) or fake_mode_of(call.like.meta.get("val"))
        with mode or nullcontext(), modes_of(call.like.meta.get("modes")):
            return call.target(*args, **kwargs)

    # --- what rules ask for ----------------------------------------------------------------

    def emit(self, call: Call, place: Any, /, *, enter: bool = True, **changed: Any) -> Any:
        """Write ``call`` as it is, with some arguments changed. ``place``: where the axis is in the
        result (one, or a tuple for several results). Whole operands of sharded work are entered."""
        nodes = self.written_nodes(call, {**call.bound, **changed}, enter)
        if isinstance(call.val, (tuple, list)):
            places = place if isinstance(place, tuple) else (place,) * len(call.val)
            return tuple(Value(v, pl, n) for v, pl, n in zip(call.val, places, nodes, strict=True))
        return Value(call.val, place, nodes[0])

    def written_nodes(
        self, call: Call, bound: dict[str, Any], enter: bool
    ) -> Sequence[fx.Node | None]:
        """The nodes of a call's results."""
        return [None] * (len(call.val) if isinstance(call.val, (tuple, list)) else 1)

    def function(
        self, call: Call, target: Any, args: tuple[Any, ...], val: Any, place: Place | None = None
    ) -> Value:
        """A helper of ours on local tensors; ``val`` is what it gives at global size."""
        return Value(val, place)

    def take(self, call: Call, x: Value, runs: Any, dim: int) -> fx.Node | None:
        """These stretches of the local tensor, joined."""
        return None

    def on_rank(self, decide: Callable[[int], Any]) -> Any:
        """What only this rank's program has; None when planning."""
        return None

    def local(self, shape: Iterable[int], place: Place) -> list[int]:
        """A shape at this rank's size (at global size when planning)."""
        return list(shape)

    def positions(self, call: Call, place: Place) -> Value:
        """The global indices 0..size-1 of a dim, at its place (as a vector)."""
        size, device = place.size, result_device(call)
        new = Call(torch.ops.aten.arange.default, (size,), {"device": device}, None, call.like)
        new.val = self.global_value(new)
        return self.at(self.emit(new, None, enter=False), place.at(0))

    def operand(self, value: Value, enter: bool) -> fx.Node:
        """The node of an operand; ``enter``: a whole one is used by sharded work."""
        raise NotImplementedError("a plan has no nodes")

    def gives_shares(self, value: Value) -> bool:
        """A parameter whose gradient stays this rank's share, for an outer reducer. An input's is
        whole: what made it outside goes by whole gradients."""
        leaf = value.origin is not None and value.origin.meta.get("is_state", False)
        return self.gradients == "shares" and leaf and self.axis.p > 1 and needs_gradient(value)

    def node(self, value: Value) -> fx.Node:
        """The local node of a value; a recipe is written whole now."""
        raise NotImplementedError("a plan has no nodes")

    def sum_across(self, value: Value, call: Call, why: str, op: str = "sum") -> Value:
        """Partial results, one on each rank, become whole."""
        return self.joined(value, call.like, why, op)

    def joined(self, value: Value, like: fx.Node, why: str, op: str) -> Value:
        self.record("all_reduce", value.val, why, like)
        return Value(value.val, None, self.summed_node(value, like, op))

    def summed_node(self, value: Value, like: fx.Node, op: str) -> fx.Node | None:
        """The node of partial results when they have met."""
        return value.node

    def moved_node(
        self, collective: Any, value: Value, like: Any, *places: Place
    ) -> fx.Node | None:
        """The node of a value that ``collective`` moves from one place (to another)."""
        return value.node

    def at(self, value: Value, place: Place) -> Value:
        """The value at a place: as it is, hoisted, resharded, or (last) gathered and sliced."""
        if value.place is None:
            return self.pushed_down(value, place)
        have, want = value.cut.refined(), place.refined()
        if have == want:
            return Value(value.val, place, value.node)
        if value.origin is not None:
            return self.pushed_down(recipe(value.origin), place)
        if (have.dim, have.outer, have.inner, have.layout.n) != (
            want.dim, want.outer, want.inner, want.layout.n,
        ):  # fmt: skip
            return self.slice(self.gather_aloud(value, "is needed cut in another dim"), place)
        return self.reshard(value, have, want)

    def pushed_down(self, value: Value, place: Place) -> Value:
        """A whole value at a place: recomputed there, or sliced."""
        return Value(value.val, place)

    def reshard(self, value: Value, have: Place, want: Place) -> Value:
        like = value.node or value.origin
        self.record("all_to_all", value.val, "two layouts of one axis meet", like)
        node = self.moved_node(torch.ops.mosaic.reshard.default, value, like, have, want)
        return Value(value.val, want, node)

    def halo(self, value: Value, have: Place, want: Place) -> Value:
        """What each rank needs of the axis, also of what others hold: a layout that overlaps."""
        like = value.node or value.origin
        if have == want:
            return Value(value.val, have, value.node)
        near = [d.length for r in range(self.axis.p) for d in want.layout.ranks[r]]
        rows = max(0, sum(near) - have.layout.n) // self.axis.p + 1
        sent = [rows if d == have.dim else n for d, n in enumerate(value.shape)]
        self.record("all_to_all", value.val.new_empty(sent), "windows reach into other ranks", like)
        node = self.moved_node(torch.ops.mosaic.halo.default, value, like, have, want)
        return Value(value.val, want, node)

    def gather_aloud(self, value: Value, why: str, like: fx.Node | None = None) -> Value:
        """The whole value on every rank, for an op that is otherwise local: said, or refused, but
        for a length of 1."""
        like = like or self.current or value.node
        is_long = value.place is not None and value.cut.size > 1
        if is_long and value.origin is None and like is not None:
            is_ours = isinstance(like.target, FunctionType)
            name = like.target.__name__ if is_ours else str(like.target).removesuffix(".default")
            self.say_gathered(name, f"has an operand that {why}", like, [value])
        return self.gather(value, why, like)

    def say_gathered(self, name: str, why: str, like: fx.Node, operands: list[Value]) -> None:
        """Every gather of an activation is said here, or refused; but for what a rule asks for as
        a part of an exact and cheap form (``gather``), and for whole outputs. A rank that is alone
        along the axis has all of it."""
        if self.axis.p == 1:
            return
        self.gathered.append((f"{name} {why}", like))
        if self.on_gather == "error":
            raise UnsupportedError(
                f"{name} cannot run on a part of axis {self.axis.name!r}: {why}",
                where=where(like),
                sizes=", ".join(f"{list(v.shape)}" for v in operands),
                fix='allow it with on_gather="warn" (every rank then computes it whole), '
                "or keep this op out of the sharded part",
            )

    def gather(self, value: Value, why: str, like: fx.Node | None = None) -> Value:
        """The whole value on every rank, unsaid: of one row, a length of 1, a vector of keys."""
        if value.place is None:
            return value
        if value.origin is not None:
            return recipe(value.origin)
        like = like or value.node
        self.record("all_gather", value.val, why, like)
        node = self.moved_node(torch.ops.mosaic.gather.default, value, like, value.place)
        return Value(value.val, None, node)

    def gather_for(self, call: Call, reason: str) -> Any:
        """No exact local form: run the op whole on every rank, and say so (or refuse)."""
        return self.emit(self.with_whole_operands(call, reason), None, enter=False)

    def with_whole_operands(self, call: Call, reason: str) -> Call:
        why = f"{call.name} {reason}"
        if self.has_recipes(call):
            return call.replaced(map_values(lambda v: self.gather(v, why), call.bound))
        self.say_gathered(call.name, reason, call.like, call.tensors())
        return call.replaced(map_values(lambda v: self.gather(v, why, call.like), call.bound))

    def has_recipes(self, call: Call) -> bool:
        """Whether every rank can have all operands whole, and nothing is sent."""
        return all(v.place is None or v.origin is not None for v in call.tensors())

    def slice(self, value: Value, place: Place) -> Value:
        """My intervals of a whole value."""
        return Value(value.val, place)

    # --- the plan --------------------------------------------------------------------------

    def record(self, op: str, val: Any, why: str, like: fx.Node | None) -> None:
        if self.axis.p == 1:
            return
        p, size = self.axis.p, prod(val.shape) * val.element_size()
        factor = (p - 1) / p * (2 if op == "all_reduce" else 1)
        # The node at hand is a global fact; a local one (a slice that keeps all) differs by rank.
        traced = self.current if self.current is not None and innermost(self.current) else like
        source = line(traced) if traced is not None else ""
        self.recorded.append(self.current)
        self.collectives.append(Collective(op, self.axis.name, int(size * factor), why, source))

    def dropout_seed(self, call: Call) -> fx.Node:
        """One int64 seed for the whole graph, drawn once per call, the same on every rank."""
        raise NotImplementedError("a plan has no nodes")

    def seed(self, call: Call) -> Value | None:
        return None

    def site(self, like: fx.Node) -> int:
        """Which random op of the program: its number in the global graph."""
        return like.meta.get("site", 0)
