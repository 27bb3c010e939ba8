"""Values that depend on sizes alone (positions, triangles): computed while compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mosaic.torch_private import fake_mode_of

aten = torch.ops.aten

#: Larger tensors than 4096 x 4096 are not worth their seconds and gigabytes.
LIMIT = 2**24

#: More ops one behind the other, or more ways up through them, than any mask has.
DEEPEST, WAYS = 60, 4000

#: Beside pointwise ops, what readers of masks follow up.
LOOKED_THROUGH = {
    f"aten::{name}"
    for name in "_to_copy _unsafe_view add alias clone contiguous detach expand index masked_fill "
    "permute reshape slice squeeze t transpose tril triu unsqueeze view where".split()
}

#: Ops that read no more of an operand than its shape, and the number that they fill with.
FILLED = {
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.ones.default: 1,
    aten.zeros.default: 0,
}
FILLED_WITH = (aten.full.default, aten.full_like.default, aten.new_full.default)  # last argument


class Constants:
    """``constants(node)``: the value of a node that no input has a part in, else None."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Tensor | None] = {}
        self._programs: dict[fx.Node, Program] = {}

    def __call__(self, node: fx.Node) -> Tensor | None:
        for n in below(node, self._known, lambda n: n.all_input_nodes if is_computed(n) else ()):
            self._known[n] = self._evaluated(n)
        return self._known[node]

    def is_long(self, node: fx.Node) -> bool:
        """Whether so much is computed elementwise before a node that no mask is: it is not read,
        but is a tensor like any other. Readers follow operands by calling themselves."""
        for n in below(node, self._programs, elementwise_operands):
            known = [self._programs[x] for x in elementwise_operands(n)]
            short = [program for program in known if not program.is_long]
            deepest = max((program.depth for program in short), default=0)
            self._programs[n] = Program(deepest + 1, sum(program.ways for program in short) + 1)
        return self._programs[node].is_long

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        """From its operands, which are known."""
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return None
        if node.op == "get_attr":
            return stored(node)
        if is_constant_fill(node):
            return torch.full([], filling(node), dtype=val.dtype).expand(val.shape)
        if not is_computed(node):
            return None
        operands = {n: self._known[n] for n in node.all_input_nodes}
        if any(x is None for x in operands.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        with torch.no_grad():
            return node.target(*args, **kwargs)


@dataclass(frozen=True)
class Program:
    """What is computed elementwise before a node: how many ops one behind the other, and how many
    ways up."""

    depth: int
    ways: int

    @property
    def is_long(self) -> bool:
        return self.depth > DEEPEST or self.ways > WAYS


def below(
    node: fx.Node, known: Mapping[fx.Node, object], operands: Callable[[fx.Node], Iterable[fx.Node]]
) -> Iterator[fx.Node]:
    """What of ``node`` and all before it is not known yet, operands first; the caller makes each
    known. Programs are thousands of ops deep, which is more than Python calls."""
    todo = [node]
    while todo:
        missing = [n for n in operands(todo[-1]) if n not in known]
        todo += missing
        if not missing:
            n = todo.pop()
            if n not in known:
                yield n


def elementwise_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of ops that a reader may look through; none of a product of matrices."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ()
    looks = torch.Tag.pointwise in target.tags or target._schema.name in LOOKED_THROUGH
    return tuple(node.all_input_nodes) if looks else ()


def is_constant_fill(node: fx.Node) -> bool:
    return node.op == "call_function" and is_function(node) and is_filled(node)


def is_computed(node: fx.Node) -> bool:
    """Whether a node can be evaluated from the values of its operands, and is worth it."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or node.op != "call_function" or not is_function(node):
        return False
    small = val.numel() <= LIMIT or node.target == aten.expand.default
    return small and not is_filled(node)


def is_filled(node: fx.Node) -> bool:
    """Whether a node is the same number everywhere, by its name."""
    return node.target in FILLED or (
        node.target in FILLED_WITH and isinstance(node.args[-1], (int, float))
    )


def filling(node: fx.Node) -> float:
    """What a filled node is everywhere."""
    return FILLED[node.target] if node.target in FILLED else node.args[-1]


def stored(node: fx.Node) -> Tensor | None:
    """A tensor that the program holds, such as ``torch.tensor([0, 0, 1])``."""
    value = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(value, Tensor) or fake_mode_of(value) is not None:
        return None
    return value.detach().cpu()


def is_function(node: fx.Node) -> bool:
    """Whether a node gives the same for the same operands, and writes to none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
