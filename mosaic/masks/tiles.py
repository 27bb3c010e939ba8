"""Reads the program of a dense mask, so that any tile of it can be made (``attention/tiles.py``).

What has an element for every pair of query and key is elementwise, or looks a table up: those are
the steps. What has not (positions, ids, a table of learned biases) is a leaf. A program with
anything else, such as a mask that the user passes in, stays the tensor it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mosaic.attention.tiles import Ref, Step, TileProgram
from mosaic.graph.ops import differentiable, is_pointwise
from mosaic.masks.constants import Constants, filling, is_filled
from mosaic.masks.terms import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Term,
    arranged,
    is_run,
    made,
    operand,
    peeled,
)

aten = torch.ops.aten
ORDER = (BATCH, HEAD, QUERY, KEY)


class UnreadableError(Exception):
    """The program has a step that no tile can be made by."""


@dataclass
class Reading:
    """One mask's program as far as it is read. Leaves are numbered from 0, steps from -1 down,
    until all leaves are known."""

    graph: fx.Graph
    constants: Constants
    leaves: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    known: dict[Any, Ref] = field(default_factory=dict)

    def value(self, term: Term) -> Ref:
        if term not in self.known:
            self.known[term] = self.pairs(term) if term.is_pairwise else self.vector(term)
        return self.known[term]

    def pairs(self, term: Term) -> Ref:
        node = term.node
        if is_filled(node):
            return self.step("filled", (filling(node), node.meta["val"].dtype))
        if cuts_gradient(node):
            return self.step("detach", (self.made(term),))
        return self.made(term)

    def made(self, term: Term) -> Ref:
        """A pairwise tensor, by its op."""
        node = term.node
        if node.op != "call_function" or is_autocast(node) or self.constants.is_long(node):
            raise UnreadableError
        if node.target == aten.embedding.default:
            return self.embedded(term)
        if node.target == aten._to_copy.default:
            return self.cast(term)
        inner = peeled(term, self.constants)
        if inner is not None:
            return self.value(inner)
        if node.target == aten.index.Tensor:
            return self.indexed(term)
        if not is_elementwise(node.target):
            raise UnreadableError
        args = tuple(self.argument(term, x) for x in node.args)
        kwargs = tuple((name, self.argument(term, x)) for name, x in node.kwargs.items())
        return self.step(name_of(node.target), args, kwargs)

    def argument(self, term: Term, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self.value(operand(term, x))
        if x is None or isinstance(x, (bool, int, float, torch.dtype)):
            return x
        raise UnreadableError

    def cast(self, term: Term) -> Ref:
        node = term.node
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].device != node.meta["val"].device:
            raise UnreadableError
        return self.step("_to_copy", (self.value(operand(term, source)),), (("dtype", dtype),))

    def embedded(self, term: Term) -> Ref:
        given: list[Any] = [*term.node.args, *term.node.kwargs.values()]
        table, index, *options = given
        if len(options) > 1 and any(options[1:]):
            raise UnreadableError  # gradients by how often an entry is used
        ref = self.table(table, (0, term.dims[-1]))
        return self.step("embedding", (ref, self.index(index, term.dims[:-1]), *options[:1]))

    def indexed(self, term: Term) -> Ref:
        """``table[index]``, ``table[:, index]`` and ``table[head, index]``."""
        table, indices = term.node.args
        used = [d for d, index in enumerate(indices) if index is not None]
        if len(used) == 2:
            return self.indexed_by_head(term)
        if len(used) != 1 or table.meta["val"].ndim > 2:
            raise UnreadableError
        (dim,) = used
        behind = table.meta["val"].ndim - dim - 1
        ndim = len(term.dims) - behind
        free = (*term.dims[:dim], *term.dims[ndim:])
        ref = self.table(table, (*free[:dim], 0, *free[dim:]), dim)
        return self.step("index", (ref, self.index(indices[dim], term.dims[dim:ndim])))

    def indexed_by_head(self, term: Term) -> Ref:
        """``table[arange(heads)[:, None, None], index]``, or the other way round."""
        table, indices = term.node.args
        shape = table.meta["val"].shape
        for dim, (head, index) in enumerate((indices, indices[::-1])):
            along = operand(term, head).coordinates, operand(term, index)
            is_head = along[0] == {HEAD} and HEAD not in along[1].coordinates
            if len(shape) == 2 and is_head and is_run(head, shape[dim], self.constants):
                dims = (HEAD, 0) if dim == 0 else (0, HEAD)
                ref = self.table(table, dims, 1 - dim)
                return self.step("index", (ref, self.index(index, along[1].dims)))
        raise UnreadableError

    def index(self, node: fx.Node, dims: tuple[int, ...]) -> Ref:
        if node.meta["val"].dtype not in (torch.int64, torch.int32):
            raise UnreadableError
        return self.value(Term(node, dims))

    def table(self, node: fx.Node, dims: tuple[int, ...], entries: int = 0) -> Ref:
        """A table as (entries, heads|1)."""
        if node.meta["val"].ndim != len(dims) or not set(dims) <= {0, HEAD}:
            raise UnreadableError
        along = tuple(KEY if dim == entries else d for dim, d in enumerate(dims))
        return self.leaf(Term(node, along), (KEY, HEAD))

    def vector(self, term: Term) -> Ref:
        if not term.coordinates <= set(ORDER):
            raise UnreadableError
        return self.leaf(term, ORDER if term.node.meta["val"].ndim else ())

    def leaf(self, term: Term, order: tuple[int, ...]) -> Ref:
        if (term, order) not in self.known:
            self.leaves.append(arranged(self.graph, term, order))
            self.known[term, order] = Ref(len(self.leaves) - 1)
        return self.known[term, order]

    def step(self, op: str, args: tuple, kwargs: tuple = ()) -> Ref:
        self.steps.append(Step(op, args, kwargs))
        return Ref(-len(self.steps))

    def program(self, term: Term) -> TileProgram:
        self.value(term)
        steps = tuple(
            Step(
                step.op,
                tuple(map(self.numbered, step.args)),
                tuple((name, self.numbered(x)) for name, x in step.kwargs),
            )
            for step in self.steps
        )
        reached = reached_by_gradients(steps, len(self.leaves))
        learned = [i for i in reached if self.leaves[i].meta.get("needs_gradient")]
        return TileProgram(steps, term.node.meta["val"].dtype, tuple(learned))

    def numbered(self, x: Any) -> Any:
        """Steps are counted behind the leaves."""
        if not isinstance(x, Ref) or x.number >= 0:
            return x
        return Ref(len(self.leaves) - x.number - 1)


def reached_by_gradients(steps: tuple[Step, ...], leaves: int) -> list[int]:
    """The leaves that the result depends on by a way without a ``detach``."""
    todo, found = [leaves + len(steps) - 1], set()
    while todo:
        number = todo.pop()
        if number in found:
            continue
        found.add(number)
        if number >= leaves and steps[number - leaves].op != "detach":
            todo += [x.number for x in steps[number - leaves].args if isinstance(x, Ref)]
    return sorted(number for number in found if number < leaves)


def tiles_of(
    graph: fx.Graph, term: Term, constants: Constants
) -> tuple[TileProgram, list[fx.Node]] | None:
    """The program of a mask (with one dim each for batch and heads, or less), and its leaves, which
    are written at the insertion point; None where it is not readable."""
    reading = Reading(graph, constants)
    try:
        program = reading.program(term)
    except UnreadableError:
        return None
    for i, leaf in enumerate(reading.leaves):
        if leaf.meta.get("needs_gradient") and i not in program.learned:
            reading.leaves[i] = made(graph, aten.detach.default, leaf)
            reading.leaves[i].meta["needs_gradient"] = False
    return (program, reading.leaves) if reading.leaves else None


def is_elementwise(target: Any) -> bool:
    """Whether a part of the result is the op on parts of its operands, whenever it is run."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    is_drawn = torch.Tag.nondeterministic_seeded in target.tags
    return is_pointwise(target) and len(target._schema.returns) == 1 and not is_drawn


def name_of(target: Any) -> str:
    """``sub.Tensor``, ``abs``."""
    return str(target).removeprefix("aten.").removesuffix(".default")


def cuts_gradient(node: fx.Node) -> bool:
    """Whether a node was made where no gradients are recorded."""
    able = differentiable(node.meta["val"])
    into = any(n.meta.get("needs_gradient") for n in node.all_input_nodes)
    return able and into and not node.meta.get("needs_gradient")


def is_autocast(node: fx.Node) -> bool:
    """Whether ops may cast their operands, unsaid."""
    modes = node.meta.get("modes")
    return modes is not None and any(on for _, on, _ in modes.autocast)
