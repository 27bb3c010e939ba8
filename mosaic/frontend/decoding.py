"""Decoding: one token at a time, against keys and values that a cache holds.

The prompt's pass (prefill) is cut like any other. A step of one token has nothing to cut: it runs
whole on every rank, as plain torch.compile runs it, at any length of the cache.

    ids = model.generate(prompt, ...)     prefill   11 tokens   cut, keys and values are made whole
                                          a step     1 token    whole, one program for all lengths
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mosaic.api.spec import ShardingSpec, binds
from mosaic.frontend.user_warnings import once
from mosaic.report.plan import Plan
from mosaic.runtime.deferred_tensor import DeferredTensor
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import placeholder_source, pytree

SAID = (
    "decoding runs whole on every rank: a step of one token, against keys and values of a cache, "
    "has nothing to cut. The prompt's pass is cut"
)


def is_step(module: fx.GraphModule, spec: ShardingSpec) -> bool:
    """Whether Dynamo's graph is a step of one token, without gradients and random numbers: that
    dim of the inputs has length 1 which the spec names, or else that of every query."""
    nodes = list(module.graph.nodes)
    values = [n.meta.get("example_value") for n in nodes]
    if torch.is_grad_enabled() or any(map(is_drawn, nodes)):
        return False
    if any(isinstance(x, (ShardedTensor, DeferredTensor)) for x in values):
        return False
    lengths = named_lengths(module, spec) or query_lengths(nodes)
    return bool(lengths) and all(isinstance(n, int) and n == 1 for n in lengths)


def named_lengths(module: fx.GraphModule, spec: ShardingSpec) -> list[Any]:
    """Of the axes that the spec cuts, in the inputs that it names."""
    found = []
    for node in module.graph.find_nodes(op="placeholder"):
        x, (source, _) = node.meta.get("example_value"), placeholder_source(node)
        for path, names in (spec.inputs or {}).items():
            dims = names.split()
            if isinstance(x, Tensor) and binds(path, source) and x.ndim == len(dims):
                cut = (axis for axis in spec.sharded if axis in dims)
                found += [x.shape[dims.index(str(axis))] for axis in cut]
    return found


def query_lengths(nodes: Sequence[fx.Node]) -> list[Any]:
    """Of every attention, where all are torch's own."""
    calls = (n for n in nodes if n.target is F.scaled_dot_product_attention)
    queries = (n.args[0] if n.args else n.kwargs["query"] for n in calls)
    return [q.meta["example_value"].shape[-2] for q in queries]


def is_drawn(node: fx.Node) -> bool:
    """Whether a call draws random numbers, which ranks must draw together."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if "dropout" in name:
        return node.kwargs.get("training", True) and not (len(node.args) > 2 and not node.args[2])
    return name.startswith(("rand", "multinomial", "bernoulli", "normal", "uniform", "exponential"))


def planned(ranks: int) -> Plan:
    """What is shown of a step; and said, once."""
    if ranks > 1:
        once(SAID)
    return Plan("", "", ranks, [], [], [], [], [SAID])


# --- of a model that is parallelized ------------------------------------------------------------


def made_whole(given: Any) -> Any:
    """Arguments of a step, whole: tensors, and in place those that caches among them hold."""
    seen: set[int] = set()

    def whole(x: Any) -> Any:
        if isinstance(x, ShardedTensor):
            return x.full_tensor()
        visit(x, whole, seen)
        return x

    return pytree.tree_map(whole, given)


def single_rows_whole(result: Any) -> Any:
    """What a model gives, whole where that is of one token (the last one's logits): nothing is
    gained by a cut, and who draws the next token reads it."""

    def is_single(x: Any) -> bool:
        return isinstance(x, ShardedTensor) and any(place.layout.n == 1 for place in x.places)

    if not any(map(is_single, pytree.tree_leaves(result))):
        return result
    return pytree.tree_map(lambda x: x.full_tensor() if is_single(x) else x, result)


def visit(holder: Any, whole: Callable[[Any], Any], seen: set[int]) -> None:
    """Every attribute of an object that is no tensor and no module, at any depth."""
    if id(holder) in seen or isinstance(holder, (Tensor, nn.Module, type)):
        return
    seen.add(id(holder))
    for name, x in [*getattr(holder, "__dict__", {}).items()]:
        held = pytree.tree_map(whole, x)
        if any(isinstance(y, ShardedTensor) for y in pytree.tree_leaves(x)):
            setattr(holder, name, held)
