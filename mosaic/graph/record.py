"""What a function does to fake tensors, op by op, as a graph.

Torch's ``make_fx`` gives the same graph, in twice the time: it patches ``nn.Module``, keeps a proxy
for each tensor, and knows symbolic sizes, constants and functions of torch, of which a function
that a pass traces has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mosaic.torch_private import (
    TorchDispatchMode,
    autograd_would_have_decomposed,
    pytree,
    snapshot_fake,
)

Table = Mapping[Any, Callable[..., Any]]


def recorded(fn: Callable[..., Any], inputs: Sequence[Tensor], decompositions: Table) -> fx.Graph:
    """The ops that ``fn(*inputs)`` runs, without those that nothing uses; ``val`` of each node is
    what it made. ``inputs``: fake tensors, each another object."""
    recorder = Recorder(decompositions)
    for x in inputs:
        recorder.note(x, recorder.graph.placeholder("x"))
    with torch.no_grad(), recorder:
        out = fn(*inputs)
    recorder.graph.output(recorder.nodes_in(out))
    recorder.graph.eliminate_dead_code()
    for node in recorder.graph.nodes:
        if node.op != "output":
            node.meta["val"] = map_aggregate(recorder.made[node], snapshot)
    return recorder.graph


def snapshot(x: Any) -> Any:
    """Another tensor that is like ``x``: Python could not free one that C++ holds as the base of a
    view, and with it the mode, in which ``emit.traced`` keeps the graph."""
    return snapshot_fake(x) if isinstance(x, Tensor) else x


class Recorder(TorchDispatchMode):
    """Writes down every op that runs, but of ops that decompose what they decompose into."""

    def __init__(self, decompositions: Table):
        super().__init__()
        self.decompositions = decompositions
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}  # so that tensors live to the end,
        self.nodes: dict[int, fx.Node] = {}  # and no other one gets the id of one of them

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question, which fake tensors answer
            return func(*args)
        if func is torch.ops.aten.detach.default:  # of torch's own; nothing here has a gradient
            return args[0]
        with self:
            out = self.decomposed(func, args, kwargs)
        if out is not NotImplemented:
            return out
        node = self.graph.call_function(func, *self.nodes_in((args, kwargs)))
        out = func(*args, **kwargs)
        self.note(out, node)
        return out

    def decomposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = NotImplemented
        if func in self.decompositions:
            out = self.decompositions[func](*args, **kwargs)
        flat = pytree.tree_leaves((args, kwargs))
        if out is NotImplemented and autograd_would_have_decomposed(func, flat):
            out = func.decompose(*args, **kwargs)
        return out

    def nodes_in(self, values: Any) -> Any:
        return map_aggregate(values, lambda x: self.nodes[id(x)] if isinstance(x, Tensor) else x)

    def note(self, out: Any, node: fx.Node) -> None:
        """``node`` has made ``out``; of a write into a tensor that is the tensor, from now on."""
        self.made[node] = out
        if isinstance(out, Tensor):
            self.nodes[id(out)] = node
        for i, part in enumerate(out if isinstance(out, (tuple, list)) else ()):
            self.note(part, self.graph.call_function(operator.getitem, (node, i)))
