"""Ops without a row: run their decomposition instead, op by op, each by its own rule."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import signature
from mosaic.graph.modes import modes_of
from mosaic.graph.strides import STRIDED
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.probing import NotLocalError, Prober
from mosaic.partition.values import Call, Value
from mosaic.torch_private import decompose_op, fake_mode_of, make_fx, pytree


def decomposed(s: ShardingInterpreter, c: Call) -> Any:
    """Trace torch's decomposition on global fake values and run it on the shards."""
    tensors = [v for v in pytree.tree_leaves(c.split(c.bound)) if isinstance(v, Value)]
    graph = decomposition(c)
    called = [n.target for n in graph.nodes if n.op == "call_function"]
    if not all(is_usable(target, c.target) for target in called):
        return s.gather_for(c, "has no rule")
    if s.has_recipes(c) and not isinstance(s, Prober) and not is_local(s, c, graph, tensors):
        return s.gather_for(c, "works along the axis")
    return run(s, c, graph, tensors)


def decomposition(c: Call) -> fx.Graph:
    """What torch makes of a call at global size. Equal calls (a model's layers, and what is planned
    and then written) are traced once, and the graph lives as long as the mode of their values."""
    leaves, spec = pytree.tree_flatten(c.split(c.bound))
    values = [v.val for v in leaves if isinstance(v, Value)]
    mode, modes = fake_mode_of(values), c.like.meta.get("modes")
    known = vars(mode).setdefault("mosaic_decompositions", {}) if mode else {}
    # By their texts: 1, 1.0 and True are equal.
    facts = (signature(v.val) if isinstance(v, Value) else repr(v) for v in leaves)
    key = (c.target, str(spec), modes, *facts)
    if key not in known:

        def program(*tensors: torch.Tensor) -> Any:
            left = iter(tensors)
            filled = [next(left) if isinstance(v, Value) else v for v in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return decompose_op(c.target, args, kwargs)

        with mode or nullcontext(), modes_of(modes):
            # Apart: the tracer would mix up two operands that are one tensor. Not pre_dispatch: a
            # composite op would only be written down as itself.
            known[key] = make_fx(program)(*[val.detach() for val in values]).graph
        for node in known[key].nodes:
            node.meta.clear()  # no value may hold the mode, which holds this graph
    graph: fx.Graph = known[key]
    return graph


def is_local(s: ShardingInterpreter, c: Call, graph: fx.Graph, tensors: list[Value]) -> bool:
    """Whether nothing is sent."""
    try:
        run(Prober(s.axis, s.rules), c, graph, tensors)
    except NotLocalError:
        return False
    return True


def is_usable(target: Any, whole: Any) -> bool:
    """prims have no derivative; an op that writes into its operand would miss the other shards; one
    that reads memory was traced with other strides than it will find."""
    schema = getattr(target, "_schema", None)
    return schema is None or not (
        target is whole
        or target in STRIDED
        or schema.is_mutable
        or schema.name.startswith("prims::")
    )


def run(s: ShardingInterpreter, c: Call, graph: fx.Graph, tensors: list[Value]) -> Any:
    env: dict[fx.Node, Any] = {}
    left = iter(tensors)
    for node in graph.nodes:
        args, kwargs = pytree.tree_map(
            lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
        )
        if node.op == "placeholder":
            env[node] = next(left)
        elif node.op == "output":
            return args[0]
        elif node.op == "get_attr":
            return s.gather_for(c, "has no rule")
        elif not hasattr(node.target, "_schema"):
            env[node] = node.target(*args, **kwargs)
        else:
            env[node] = s.call(c, node.target, *args, **kwargs)
    raise AssertionError("a decomposition without an output")
