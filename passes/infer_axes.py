"""Find the axes to cut, and the nodes in which they begin.

With names an axis is a dim of a named input. Without, each attention's query dim is followed back
through the program to where it begins, and the longest such axis is taken. Nothing is rewritten but
``context.axes``: their lengths, methods and seeds (node, dim).

There are no backward rules. To step back over an op, candidate places of each operand go through
the op's own forward rule, and one that gives the place at hand is a carrier of the axis.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.api.methods import Auto, Ring
from mosaic.api.spec import binds
from mosaic.graph.ops import key
from mosaic.graph.source import line
from mosaic.layout import Layout, Place
from mosaic.masks.op import ATTENTIONS
from mosaic.masks.softmax import UNKNOWN, unread_softmax
from mosaic.partition.context import Context
from mosaic.partition.probing import probe
from mosaic.partition.table import RULES
from mosaic.partition.values import Axis, candidates
from mosaic.recurrences.call import rows_of
from mosaic.recurrences.loops import LOOP, NOTHING, loops
from mosaic.recurrences.op import RECURRENCE
from mosaic.runtime.world import own_axes

aten = torch.ops.aten
#: What reads one row for another: by attention, or by a state that goes along.
MIXERS = (*ATTENTIONS, RECURRENCE)


def infer_axes(graph: fx.Graph, context: Context) -> int:
    attentions = [node for node in graph.nodes if node.target in MIXERS]
    if context.arriving:
        context.axes = arriving_axes(graph, context)
        return len(context.arriving)
    named = () if context.has_other_names else named_axes(graph, context)
    if named:
        context.axes = one_for_each_mesh_axis(named, context)
    elif context.spec.sharded and context.is_first_graph and not context.has_other_names:
        raise unbound(graph, context)
    elif context.spec.axes and not context.spec.sharded:
        context.notes.append("every axis is 'local': nothing is cut")
    elif attentions:
        context.axes = longest_axis(attentions, context)
    else:
        context.notes.append(nothing_attends(graph))
    return sum(len(axis.seeds) for axis in context.axes)


def nothing_attends(graph: fx.Graph) -> str:
    found = [(UNKNOWN, node) for node in [unread_softmax(graph)] if node]
    found += [(LOOP, node) for node, _, _ in loops(graph)]
    if not found:
        return NOTHING
    why, node = found[0]
    return f"{why}, so the graph stays whole on every rank: {line(node)}"


# --- by what arrives cut ------------------------------------------------------------------------


def arriving_axes(graph: fx.Graph, context: Context) -> tuple[Axis, ...]:
    """For each mesh axis that cuts inputs its axis, named and done as the spec says; in the order
    of the mesh. Its layout is that of the longest dim that it cuts, in the largest tensor."""
    placeholders = graph.find_nodes(op="placeholder")
    longest: dict[str, tuple[int, int, Layout]] = {}
    for index, places in context.arriving.items():
        size = placeholders[index].meta["val"].numel()
        for place in places:
            known = longest.get(place.mesh_axis, (-1, -1, place.layout))
            found = (place.layout.n, size, place.layout)
            longest[place.mesh_axis] = max(known, found, key=lambda one: one[:2])
    named = {m.mesh: (str(name), m) for name, m in context.spec.sharded.items()}
    axes = {}
    for mesh, (_, _, layout) in longest.items():
        name, method = named.get(mesh, (mesh, Auto(mesh=mesh)))
        axes[mesh] = Axis(name, mesh, layout, method)
    return tuple(axes[mesh] for mesh in sorted(axes, key=context.world.position))


# --- by name ------------------------------------------------------------------------------------


def named_axes(graph: fx.Graph, context: Context) -> tuple[Axis, ...]:
    axes = []
    for name, method in context.spec.sharded.items():
        found = named_dims(graph, context, name)
        if found:
            n = max(size for _, _, size in found)
            seeds = tuple((node.name, dim) for node, dim, size in found if size == n)
            layout = Layout.even(n, context.on(method.mesh).size)
            axes.append(Axis(str(name), method.mesh, layout, method, seeds))
    return tuple(axes)


def one_for_each_mesh_axis(axes: tuple[Axis, ...], context: Context) -> tuple[Axis, ...]:
    """A tensor is cut over a mesh axis only once: the longest axis is, others on it stay whole."""
    kept: list[Axis] = []
    for axis in sorted(axes, key=lambda a: -a.layout.n):
        mine = own_axes(axis.mesh_axis)
        rival = next((k for k in kept if mine & own_axes(k.mesh_axis)), None)
        if rival is None:
            kept.append(axis)
        else:
            context.notes.append(
                f"axis {axis.name!r} ({axis.layout.n}) stays whole: {rival.name!r} "
                f"({rival.layout.n}) is cut over mesh axis {rival.mesh_axis!r}"
            )
    return tuple(axis for axis in axes if axis in kept)


def named_dims(
    graph: fx.Graph, context: Context, name: str | int
) -> list[tuple[fx.Node, int, int]]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    tensors = [
        (node, i)
        for node, i in zip(placeholders, context.inputs, strict=True)
        if not i.is_state and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    if isinstance(name, int):
        return dim_of_only_input(tensors, name)
    found = []
    for path, dims in (context.spec.inputs or {}).items():
        if name in dims.split():
            node = next((n for n, i in tensors if binds(path, i.source)), None)
            is_other = not context.is_first_graph and len(dims.split()) != dims_of(node)
            if node is not None and not is_other:  # behind a break a name may be another's
                found.append(sized(node, path, dims, dims.split().index(name)))
    return found


def dim_of_only_input(tensors: list, dim: int) -> list[tuple[fx.Node, int, int]]:
    if len(tensors) != 1:
        raise ShardingError(
            f"axes={{{dim}: ...}} needs a single tensor argument",
            arguments=", ".join(i.name for _, i in tensors),
            fix="name its dims instead: inputs={'x': 'batch rows columns'}, axes={'rows': 'ring'}",
        )
    node = tensors[0][0]
    ndim = node.meta["val"].ndim
    if not -ndim <= dim < ndim:
        raise ShardingError(
            f"there is no dim {dim} in {tensors[0][1].name}",
            sizes=list(node.meta["val"].shape),
            fix=f"use one of its {ndim} dims, from 0 or from -1",
        )
    return [(node, dim % ndim, node.meta["val"].shape[dim])]


def dims_of(node: fx.Node | None) -> int:
    return node.meta["val"].ndim if node is not None else 0


def sized(node: fx.Node, path: str, dims: str, dim: int) -> tuple[fx.Node, int, int]:
    shape = list(node.meta["val"].shape)
    if len(dims.split()) != len(shape):
        raise ShardingError(
            f"{path} has {len(shape)} dims, and {len(dims.split())} names were given",
            names=dims,
            sizes=shape,
            fix="give each dim a name, and _ to those that do not matter",
        )
    return node, dim, shape[dim]


def unbound(graph: fx.Graph, context: Context) -> ShardingError:
    names = ", ".join(map(repr, context.spec.inputs or {}))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    have = ", ".join(
        i.name
        for node, i in zip(placeholders, context.inputs, strict=True)
        if not i.is_state and isinstance(node.meta.get("val"), torch.Tensor)
    )
    fix = "use these names (or paths such as batch['ids']) as keys of inputs"
    if context.goes_on:
        fix += (
            "; a function that yours calls, and that breaks the graph, is compiled by itself and "
            "has names of its own: pass mosaic.distribute(x, dim) in place of x, or use "
            "mosaic.parallelize"
        )
    return ShardingError(
        f"no tensor argument of the compiled function is called {names}",
        arguments=have or "none",
        fix=fix,
    )


# --- by following attentions back ---------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    node: fx.Node
    place: Place


def longest_axis(attentions: list[fx.Node], context: Context) -> tuple[Axis, ...]:
    """The longest attended axis; of one length the first in the program."""
    search = Search(attentions[0].graph)
    best: tuple[Begin, ...] = ()
    for node in attentions:
        found = search.begins(node)
        if found and (not best or found[0].place.layout.n > best[0].place.layout.n):
            best = found
    if not best:
        context.notes.append("no attended axis depends on an input: the graph stays whole")
        return ()
    n = best[0].place.layout.n
    method = next(iter(context.spec.sharded.values()), Auto(mesh=context.spec.mesh_axis))
    layout = Layout.even(n, context.on(method.mesh).size)
    seeds = tuple((b.node.name, b.place.dim) for b in best)
    name = axis_name(best[0], context)
    return (Axis(name, method.mesh, layout, method, seeds),)


def axis_name(begin: Begin, context: Context) -> str:
    """``x.1`` for dim 1 of argument x, else the place in the program."""
    if begin.node.op != "placeholder":
        return f"dim {begin.place.dim} of {begin.node.name}"
    placeholders = [n for n in begin.node.graph.nodes if n.op == "placeholder"]
    given = context.inputs[placeholders.index(begin.node)]
    return f"{given.name}.{begin.place.dim}"


class Search:
    """Follows the axes that attentions attend over back to where they begin. The attentions of one
    graph share what is known: every node is looked at once for each place of an axis in it."""

    def __init__(self, graph: fx.Graph):
        inputs = (n for n in graph.nodes if n.op == "placeholder" and not n.meta.get("is_state"))
        self.data = behind(graph, inputs)
        self.known: dict[Begin, tuple[Begin, ...]] = {}

    def begins(self, attention: fx.Node) -> tuple[Begin, ...]:
        """Where the axis of ``attention`` begins: the longest ones that hold data."""
        query, dim = mixed(attention)
        start = Begin(query, Place(Layout.even(query.meta["val"].shape[dim], 2), dim))
        carried: dict[Begin, list[Begin]] = {}
        todo = [start]
        while todo:
            at = todo[-1]
            if at in self.known:
                todo.pop()
                continue
            if at not in carried:
                carried[at] = self.carriers(at.node, at.place)
                todo += [before for before in carried[at] if before not in self.known]
                continue
            self.known[at] = self.longest(at, carried[at])
        return self.known[start]

    def longest(self, at: Begin, carriers: list[Begin]) -> tuple[Begin, ...]:
        if not carriers:
            is_begin = at.node in self.data and (at.place.outer, at.place.inner) == (1, 1)
            return (at,) if is_begin else ()
        found = dict.fromkeys(b for before in reversed(carriers) for b in self.known[before])
        n = max((b.place.layout.n for b in found), default=0)
        return tuple(b for b in found if b.place.layout.n == n)

    def carriers(self, node: fx.Node, place: Place) -> list[Begin]:
        """The operands that carry the axis, with its place in each."""
        if node.op != "call_function":
            return []
        index = None
        if node.target is operator.getitem:  # one of several results
            node, index = node.args
        operands = [n for n in node.all_input_nodes if n in self.data]
        name = key(node.target) if hasattr(node.target, "_schema") else ""  # a collective of ours
        if name == "slice.Tensor" and is_causal(node, place):
            return [Begin(node.args[0].args[0], place)]
        if name in ("slice.Tensor", "cat") and along_axis(node, place):
            operands = [
                n for n in operands if whole_length(n, place.dim) >= place.layout.n or name == "cat"
            ]
            longest = max((whole_length(n, place.dim) for n in operands), default=0)
            same = [n for n in operands if whole_length(n, place.dim) == longest]
            return [Begin(n, replace(place, layout=Layout.even(longest, 2))) for n in same]
        return [
            Begin(operand, candidate)
            for operand in operands
            if isinstance(operand.meta.get("val"), torch.Tensor)
            for candidate in candidates(operand.meta["val"].shape, place)
            if same_place(probed(node, operand, candidate, index), place)
        ]


def mixed(node: fx.Node) -> tuple[fx.Node, int]:
    """What an attention or a recurrence goes over, and in which dim."""
    if node.target is RECURRENCE:
        tensors, call = node.args
        at, dim = rows_of(call)
        return tensors[at], dim
    query = node.args[0]
    return query, query.meta["val"].ndim - 2


def is_causal(node: fx.Node, place: Place) -> bool:
    """Whether a slice leaves of a convolution what is padded in front: as many rows as it has got.
    The axis is that of its input, and not longer."""
    x = node.args[0]
    if not hasattr(x.target, "_schema") or not key(x.target).startswith("conv"):
        return False
    return along_axis(node, place) and whole_length(x.args[0], place.dim) == place.layout.n


def behind(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources, and all nodes that depend on them."""
    found = set(sources)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def along_axis(node: fx.Node, place: Place) -> bool:
    position = node.args[1] if len(node.args) > 1 else 0
    return position % node.meta["val"].ndim == place.dim and (place.outer, place.inner) == (1, 1)


def whole_length(node: fx.Node, dim: int) -> int:
    return node.meta["val"].shape[dim]


def probed(node: fx.Node, operand: fx.Node, candidate: Place, index: int | None) -> Place | None:
    axis = Axis("", candidate.mesh_axis, candidate.layout, Ring())
    found = probe(axis, RULES, node, {operand: candidate})
    return found[index] if isinstance(found, tuple) and index is not None else found


def same_place(found: Place | None, place: Place) -> bool:
    return found is not None and (found.refined() == place.refined())
