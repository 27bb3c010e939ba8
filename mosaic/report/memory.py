"""What a rank holds in a training step, by kind: counted from its graphs, before anything runs.

    fwd:  h = mm(x, w);  y = silu(h);  z = mm(y, v)        kept for backward: h, y
    bwd:  placeholders h, y, dz                            held: from there to their last reader

A tensor takes memory from the op that makes it to its last reader; a view takes none. What is
elementwise takes none where nobody but elementwise ops and reductions reads it: Inductor computes
it inside of their kernels. So the most that a step holds is known, up to what kernels need for
themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import fx

from mosaic.attention.cost import size
from mosaic.graph.inputs import Input
from mosaic.graph.ops import is_pointwise

aten = torch.ops.aten
LOSSES = {aten.cross_entropy_loss.default, aten._log_softmax.default, aten.log_softmax.int}
_wait = torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``activations``, ``logits`` and ``outputs``: held from forward to
    backward, saved or returned; ``peak``: the most that a step holds, gradients as they come."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    outputs: int
    peak: int

    @property
    def kept(self) -> int:
        """From forward to backward, beside parameters and inputs."""
        return self.activations + self.logits + self.outputs

    def __str__(self) -> str:
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        rows["at most in a step"] = rows.pop("peak")
        return "\n".join(f"{name:<18}{size(held):>12}" for name, held in rows.items())


@dataclass(frozen=True)
class Parameter:
    """A parameter or a buffer of this rank."""

    name: str
    numel: int
    itemsize: int
    is_trained: bool


@dataclass(frozen=True)
class Kept:
    """What one graph keeps for backward, and the most that it holds, with the gradients of its
    parameters cut into ``shards``."""

    activations: int = 0
    logits: int = 0
    outputs: int = 0
    peak: int = 0


def memory_of(
    parameters: Iterable[Parameter],
    kept: Sequence[Kept],
    *,
    shards: int = 1,
    moments: int = 2,
    dtype: torch.dtype | None = None,
) -> Memory:
    """Of a program of one or several graphs. ``shards``: ranks over which FSDP2 cuts parameters;
    ``moments``: tensors of an optimizer for each (AdamW's two); ``dtype``: of parameters, their
    gradients and moments, if not that of the graph (mixed precision)."""
    known = {p.name: p for p in parameters}.values()

    def held(some: Iterable[Parameter]) -> int:
        return sum(p.numel * (dtype.itemsize if dtype else p.itemsize) for p in some) // shards

    trained = held(p for p in known if p.is_trained)
    together = {
        kind: sum(getattr(one, kind) for one in kept)
        for kind in ("activations", "logits", "outputs")
    }
    beside = max((one.peak - one.activations - one.logits - one.outputs for one in kept), default=0)
    at_work = max(sum(together.values()) + beside, trained)
    state = held(known) + moments * trained
    return Memory(held(known), trained, moments * trained, **together, peak=state + at_work)


def parameters_of(graph: fx.Graph, inputs: Sequence[Input]) -> list[Parameter]:
    """The state among a local program's inputs."""
    found = []
    for node, given in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        val = node.meta.get("val")
        if given.is_state and isinstance(val, torch.Tensor):
            is_trained = bool(node.meta.get("requires_grad"))
            found.append(Parameter(given.source, val.numel(), val.element_size(), is_trained))
    return found


def kept_by(local: fx.Graph, forward: fx.Graph, backward: fx.Graph, shards: int = 1) -> Kept:
    """What is kept between the graphs of a program, and the most that they hold."""
    before, after = Lifetimes(forward), Lifetimes(backward)
    outputs = flat(forward.output_node().args[0])
    given = backward.find_nodes(op="placeholder")
    saved = [node for node in given if not node.name.startswith("tangents")]
    split = len(outputs) - len(saved)
    roots = [before.made(node) for node in outputs]
    returned, kept = (set().union(*some) for some in (roots[:split], roots[split:]))
    logits = {root for root in kept | returned if is_logits(root, local)}
    arrives = {node: nbytes(node) for node in given if node not in saved}
    stays = set()
    for root in kept:  # several may look at one
        views = [node for node, these in zip(saved, roots[split:], strict=True) if root in these]
        last = max(views, key=lambda node: after.last.get(node, 0))
        arrives[last] = nbytes(root)
        stays |= {last} if root in returned else set()
    rest = total(returned - kept)
    peaks = [before.peak({}, kept | returned), after.peak(arrives, stays, shards) + rest]
    return Kept(
        activations=total(kept - logits),
        logits=total(logits),
        outputs=total(returned - kept - logits),
        peak=max(peaks),
    )


def is_logits(node: fx.Node, local: fx.Graph) -> bool:
    """Whether a tensor is as large as what a loss of class numbers is made of, and has a dim of
    its classes."""
    shape, count = node.meta["val"].shape, node.meta["val"].numel()
    read = [n.args[0].meta["val"].shape for n in local.nodes if n.target in LOSSES]
    return any(len(x) > 1 and x[1] in shape and count >= x.numel() for x in read)


def total(nodes: Iterable[fx.Node]) -> int:
    return sum(map(nbytes, nodes))


def nbytes(node: fx.Node) -> int:
    val = node.meta.get("val")
    return val.untyped_storage().nbytes() if isinstance(val, torch.Tensor) else 0


def flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Lifetimes:
    """Whose memory each node of a lowered graph reads."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.returned = {n for n in flat(graph.output_node().args[0]) if isinstance(n, fx.Node)}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            self.roots[node] = self.roots_of(node)

    def roots_of(self, node: fx.Node) -> frozenset[fx.Node]:
        """Those that hold what a node's value is read from: itself, what it is a view of, or what
        it is computed from when it is read."""
        read = [self.roots[n] for n in node.all_input_nodes]
        base = base_of(node)
        if base is not None:
            return self.roots[base]
        if node.op == "call_function" and self.is_fused(node):
            return frozenset().union(*read)
        return frozenset([node])

    def is_fused(self, node: fx.Node) -> bool:
        if not elementwise(node) or node in self.returned:
            return False
        todo = list(node.users)
        while todo:
            user = todo.pop()
            if base_of(user) is not None:
                if user in self.returned:
                    return False
                todo += user.users
            elif not elementwise(user) and not reduces(user):
                return False
        return True

    def made(self, node: Any) -> frozenset[fx.Node]:
        """What this graph made of a node's memory: nothing, where that was given."""
        if not isinstance(node, fx.Node):
            return frozenset()
        return frozenset(n for n in self.roots[node] if n.op != "placeholder")

    @cached_property
    def last(self) -> dict[fx.Node, int]:
        """The last node that reads a memory, by its number."""
        found: dict[fx.Node, int] = {}
        for number, node in enumerate(self.graph.nodes):
            for read in node.all_input_nodes if node.op != "output" else ():
                found.update(dict.fromkeys(self.roots[read], number))
        return found

    def peak(self, given: Mapping[fx.Node, int], stays: set[fx.Node], shards: int = 1) -> int:
        """The most that is held while the graph runs. ``given``: bytes that are there when it
        begins; ``stays``: what others hold to the end; of a result a rank then has one of
        ``shards``."""
        results = {root for node in self.returned for root in self.made(node)} - stays
        ends: dict[int, int] = {}
        held = most = sum(given.values())
        for number, node in enumerate(self.graph.nodes):
            taken = given.get(node, 0)
            if self.roots[node] == {node} and node.op == "call_function":
                taken = nbytes(node)
                held += taken
                most = max(most, held)
            left = taken if node in stays else taken // shards if node in results else 0
            until = self.last.get(node, number)
            ends[until] = ends.get(until, 0) + taken - left
            held -= ends.pop(number, 0)
        return most


def storage(node: fx.Node) -> int:
    """What a tensor's memory is known by; 0 for what is no tensor."""
    val = node.meta.get("val")
    return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else 0


def base_of(node: fx.Node) -> fx.Node | None:
    """What a node is a view of."""
    if node.op != "call_function":
        return None
    if node.target is _wait:
        return node.all_input_nodes[0]
    source: Any = node.args[0] if node.target is operator.getitem else node
    own = storage(node)
    return next((n for n in source.all_input_nodes if own and storage(n) == own), None)


def elementwise(node: fx.Node) -> bool:
    target: Any = node.target
    return node.op == "call_function" and hasattr(target, "tags") and is_pointwise(target)


def reduces(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())
