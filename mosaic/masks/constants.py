"""Values that depend on sizes alone (positions, triangles): computed while compiling."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mosaic.torch_private import fake_mode_of

aten = torch.ops.aten

#: Larger tensors than 4096 x 4096 are not worth their seconds and gigabytes.
LIMIT = 2**24

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

    def __call__(self, node: fx.Node) -> Tensor | None:
        if node not in self._known:
            self._known[node] = self._evaluated(node)
        return self._known[node]

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return None
        if node.op == "get_attr":
            return stored(node)
        if node.op != "call_function" or not is_function(node):
            return None
        if is_filled(node):
            return torch.full([], filling(node), dtype=val.dtype).expand(val.shape)
        if val.numel() > LIMIT and node.target != aten.expand.default:
            return None
        operands = {n: self(n) for n in node.all_input_nodes}
        if any(x is None for x in operands.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        with torch.no_grad():
            return node.target(*args, **kwargs)


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
