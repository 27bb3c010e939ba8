"""What of a program follows the length: a bucket's program beside that of one row less.

view(x, [2, 64, 3, 8])     and     view(x, [2, 63, 3, 8])       dim 1 follows it
div(total, 64)             and     div(total, 63)               so does a number
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.api.buckets import Bucket
from mosaic.graph.source import line
from mosaic.layout import Layout, Place
from mosaic.torch_private import pytree

#: For each dim of a result how many elements a row of the axis has there; 0: it has another length.
Slopes = tuple[int, ...]
#: The arguments of a node that follow the length: what they are at the bucket's, and at one less.
Numbers = dict[str, tuple[Any, Any]]


class NotPaddedError(Exception):
    """A program has no exact form for rows of padding, and why."""

    def __init__(self, reason: str, node: fx.Node | None = None):
        super().__init__(reason)
        self.reason, self.node = reason, node

    def said(self) -> str:
        at = f" [{line(self.node)}]" if self.node is not None else ""
        return f"each length is compiled by itself, in spite of buckets: {self.reason}{at}"


@dataclass(eq=False)
class Length:
    """The length of an axis, as data: ``node`` (an int64 number) in the program of a bucket, which
    is right for ``least`` rows and more. ``now``: how many it is compiled with."""

    axis: str
    bucket: Bucket
    now: int
    node: fx.Node
    follows: Mapping[fx.Node, tuple[Slopes, ...]]  # for each of a node's results
    numbers: Mapping[fx.Node, Numbers]
    least: int = 2

    def needs(self, least: int) -> bool:
        """Whether there are so many rows now; the program is then for no less."""
        if least <= self.now:
            self.least = max(self.least, least)
        return least <= self.now

    def place(self, dim: int, more: int = 0) -> Place:
        """Rows that are real, and padding, of a dim of the bucket's length and ``more``: as if two
        ranks had them. What is local to both does not mix them. Raises NotPaddedError for a dim
        without rows."""
        if not self.needs(1 - more):
            raise NotPaddedError(f"has no row left of {self.now}")
        n, real = self.bucket.high + more, min(self.now, self.bucket.high - 1) + more
        return Place(Layout.of(n, [[(0, real)], [(real, n)]]), dim)

    def more(self, place: Place) -> int:
        """By how many rows a dim is longer than the axis."""
        return place.layout.n - self.bucket.high


def compared(
    graph: fx.Graph, shorter: fx.Graph
) -> tuple[dict[fx.Node, tuple[Slopes, ...]], dict[fx.Node, Numbers]]:
    """``Length.follows`` and ``Length.numbers``, of the same program for a length less by one.

    Raises NotPaddedError where that has another form.
    """
    if len(graph.nodes) != len(shorter.nodes):
        raise NotPaddedError("another length makes another program")
    follows: dict[fx.Node, tuple[Slopes, ...]] = {}
    numbers: dict[fx.Node, Numbers] = {}
    twin: dict[fx.Node, fx.Node] = {}
    for node, other in zip(graph.nodes, shorter.nodes, strict=True):
        twin[other] = node
        if node.op == "placeholder":
            follows[node] = (slopes(node.meta.get("val"), other.meta.get("val"), node),)
            continue
        changed = changed_arguments(node, other, twin)
        if node.op == "output":
            if changed:
                raise NotPaddedError("the program returns its length")
            continue
        if changed:
            numbers[node] = changed
        pairs = zip(values(node), values(other), strict=True)
        follows[node] = tuple(slopes(a, b, node) for a, b in pairs)
    return follows, numbers


def values(node: fx.Node) -> list[Any]:
    val = constant(node) if node.op == "get_attr" else node.meta.get("val")
    return list(val) if isinstance(val, (tuple, list)) else [val]


def constant(node: fx.Node) -> Any:
    """A tensor that the program holds."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


def slopes(a: Any, b: Any, node: fx.Node) -> Slopes:
    if not isinstance(a, Tensor):
        return ()
    if a.ndim != b.ndim or a.dtype != b.dtype:
        raise NotPaddedError("has another form at another length", node)
    if node.op == "get_attr" and not (a.shape == b.shape and torch.equal(a, b)):
        raise NotPaddedError("is a constant made of the length", node)
    found = tuple(int(m) - int(n) for m, n in zip(a.shape, b.shape, strict=True))
    for size, slope in zip(a.shape, found, strict=True):
        if slope < 0 or (slope and int(size) % slope):
            raise NotPaddedError(f"has sizes {list(a.shape)} that do not grow with it", node)
    return found


def changed_arguments(node: fx.Node, other: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> Numbers:
    """The arguments that are other numbers, by name."""
    if node.op != other.op or (node.op == "call_function" and node.target != other.target):
        raise NotPaddedError("another length makes another program", node)
    mine, others = named_arguments(node), named_arguments(other)
    if mine.keys() != others.keys():
        raise NotPaddedError("is called otherwise at another length", node)
    pairs = {name: (x, others[name]) for name, x in mine.items()}
    return {name: (x, y) for name, (x, y) in pairs.items() if not same(x, y, twin)}


def named_arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else list(map(str, range(len(node.args))))
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def same(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether two arguments are of one form, and equal. Raises NotPaddedError for another form."""
    mine, form = pytree.tree_flatten(a)
    others, other_form = pytree.tree_flatten(b)
    if form != other_form:
        raise NotPaddedError("another length makes another program")
    pairs = list(zip(mine, others, strict=True))
    nodes = [(x, y) for x, y in pairs if isinstance(x, fx.Node) or isinstance(y, fx.Node)]
    if any(twin.get(y) is not x for x, y in nodes):
        raise NotPaddedError("another length makes another program")
    return all(x == y for x, y in pairs if not isinstance(x, fx.Node))
