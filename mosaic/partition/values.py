"""What rules talk about: values with places, calls with named arguments, and the axis itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mosaic.api.methods import Method
from mosaic.graph.ops import differentiable
from mosaic.layout import Layout, Place
from mosaic.torch_private import pytree


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the global program: ``val`` at global size, and where the axis sits in it.

    ``place`` None means whole. ``node`` is its node in the local program; a whole value whose node
    is None is a recipe, ``origin`` its node in the global graph.
    """

    val: torch.Tensor
    place: Place | None = None
    node: fx.Node | None = None
    origin: fx.Node | None = None

    @property
    def cut(self) -> Place:
        """The place of a value that is not whole."""
        assert self.place is not None, "a whole value has no place"
        return self.place

    @property
    def shape(self) -> torch.Size:
        return self.val.shape

    @property
    def ndim(self) -> int:
        return self.val.ndim


class Call:
    """One op with its arguments by name. Tensor arguments are ``Value``s."""

    def __init__(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any, like: fx.Node
    ):
        self.target = target
        self.val = val
        self.like = like
        names = [a.name for a in target._schema.arguments]
        defaults = {a.name: a.default_value for a in target._schema.arguments}
        self.bound: dict[str, Any] = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    @property
    def x(self) -> Value:
        """The tensor that most ops call ``self``."""
        found: Value = self.bound["self"]
        return found

    @property
    def name(self) -> str:
        return str(self.target).removesuffix(".default")

    def tensors(self) -> list[Value]:
        return [v for v in pytree.tree_leaves(self.bound) if isinstance(v, Value)]

    def replaced(self, bound: dict[str, Any]) -> Call:
        """The same call with other arguments."""
        new = copy(self)
        new.bound = {**self.bound, **bound}
        return new

    def split(self, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the op, defaults left out."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        schema = self.target._schema.arguments
        last = max(
            (
                i
                for i, a in enumerate(schema)
                if not a.kwarg_only
                and (bound[a.name] is not a.default_value or not a.has_default_value())
            ),
            default=-1,
        )
        for i, argument in enumerate(schema):
            value = bound[argument.name]
            if not argument.kwarg_only and i <= last:
                args.append(value)
            elif argument.kwarg_only and value is not argument.default_value:
                kwargs[argument.name] = value
        return tuple(args), kwargs


@dataclass(frozen=True)
class Axis:
    """A sharded axis of one graph: its name, mesh axis, base layout, and where it begins."""

    name: str
    mesh_axis: str
    layout: Layout
    method: Method
    seeds: tuple[tuple[str, int], ...] = ()  # (node, dim)

    @property
    def p(self) -> int:
        return self.layout.p


@dataclass(frozen=True)
class Collective:
    """One line of the plan: what is communicated, how much leaves each rank, and why."""

    op: str
    axis: str
    bytes: int
    why: str
    source: str


def recipe(node: fx.Node) -> Any:
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        return Many(node)
    return Value(val, None, None, node) if isinstance(val, torch.Tensor) else val


@dataclass(frozen=True)
class Many:
    """Several whole results that nobody has asked for yet; ``getitem`` on it is a recipe again."""

    origin: fx.Node


def map_values(fn: Callable[[Value], Any], tree: Any) -> Any:
    """``fn`` on every value in nested arguments."""
    return pytree.tree_map(lambda v: fn(v) if isinstance(v, Value) else v, tree)


def is_whole(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(is_whole(v) for v in value)
    return not isinstance(value, Value) or value.place is None


def places_of(value: Any) -> Any:
    """The place of a value; for several results a tuple of places."""
    if isinstance(value, tuple):
        found = tuple(places_of(v) for v in value)
        return found if any(found) else None
    return value.place if isinstance(value, Value) else None


def candidates(shape: Iterable[int], place: Place) -> list[Place]:
    """Every way in which ``place``'s axis could sit in a tensor of this shape."""
    found = []
    for dim, size in enumerate(shape):
        if place.layout.n and size and size % place.layout.n == 0:
            rest = size // place.layout.n
            found += [
                Place(place.layout, dim, outer, rest // outer, place.mesh_axis)
                for outer in range(1, rest + 1)
                if rest % outer == 0
            ]
    return found


def needs_gradient(value: Value) -> bool:
    """Whether a gradient flows into this value; one that is no recipe is assumed to have it."""
    if value.origin is None:
        return differentiable(value.val)
    return bool(value.origin.meta.get("needs_gradient"))


def result_device(call: Call) -> torch.device:
    leaves = [v for v in pytree.tree_leaves(call.val) if isinstance(v, torch.Tensor)]
    return leaves[0].device
