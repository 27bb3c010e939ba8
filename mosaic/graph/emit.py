"""How passes make nodes: the only place that calls ``graph.call_function``."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from mosaic.graph.modes import modes_of
from mosaic.graph.ops import is_effect
from mosaic.graph.record import recorded
from mosaic.torch_private import (
    decompositions_for_inductor,
    fake_mode_of,
    no_tracing_context,
    pytree,
    rename_afresh,
)

#: What a new node takes over from the node that it is made for: its source line, and the marks of
#: the ``torch.utils.checkpoint`` region it lies in.
INHERITED = ("stack_trace", "recompute", "ac_graph_id", "modes")


def insert(
    graph: fx.Graph,
    like: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    name: str | None = None,
    val: Any = None,
    meta: dict[str, Any] | None = None,
) -> fx.Node:
    """Add ``target(*args)`` at the insertion point: a fake value, and ``like``'s source line."""
    node = graph.create_node(
        "call_function", target, args, kwargs or {}, name=name or name_of(target)
    )
    node.meta.update({key: like.meta[key] for key in INHERITED if key in like.meta})
    node.meta.update(meta or {})
    if val is not None:
        node.meta["val"] = val
        return node
    values_args, values_kwargs = map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    mode = fake_mode_of(values_args, values_kwargs) or fake_mode_of(like.meta.get("val"))
    with mode or nullcontext(), modes_of(like.meta.get("modes")):
        node.meta["val"] = target(*values_args, **values_kwargs)
    return node


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nobody uses, but for checks (``_linalg_check_errors``), which have no result."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or is_effect(node))


def splice(
    graph: fx.Graph,
    node: fx.Node,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    meta: dict[str, Any] | None = None,
) -> Any:
    """Trace ``fn(*args)`` at the fake values of the nodes in ``args``; write it before ``node``.

    Gives what ``fn`` gives, with nodes for tensors. ``fn`` may make no tensor constants. ``meta``:
    what the new nodes have beside their value and ``node``'s source.
    """
    inputs = [x for x in pytree.tree_leaves(args) if isinstance(x, fx.Node)]
    program = traced(fn, args)
    copies: dict[fx.Node, Any] = {}
    unused = iter(inputs)
    with graph.inserting_before(node):
        for step in program.nodes:
            if step.op == "placeholder":
                copies[step] = next(unused)
            elif step.op == "output":
                return map_arg(step.args[0], copies.__getitem__)
            else:
                step_args, step_kwargs = map_arg((step.args, step.kwargs), copies.__getitem__)
                val = step.meta["val"]
                copies[step] = insert(
                    graph, node, step.target, step_args, step_kwargs, val=val, meta=meta
                )
    raise AssertionError("a traced graph has an output")


def traced(fn: Callable[..., Any], args: tuple[Any, ...]) -> fx.Graph:
    """What ``fn(*args)`` does; equal calls (a model's layers) are traced once per compilation."""
    flat, tree = pytree.tree_flatten(args)
    values = [x.meta["val"] for x in flat if isinstance(x, fx.Node)]
    mode = fake_mode_of(values)
    known = vars(mode).setdefault("mosaic_traces", {}) if mode else {}  # they live as long as it
    facts = (signature(x.meta["val"]) if isinstance(x, fx.Node) else x for x in flat)
    key = (fn, str(tree), *facts)
    if key not in known:

        def program(*tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(x, fx.Node) else x for x in flat]
            return fn(*pytree.tree_unflatten(filled, tree))

        with no_tracing_context(), mode or nullcontext():
            # Nodes that were written from one trace share its values; the tracer would mix them up.
            apart = [value.detach() for value in values]
            known[key] = recorded(program, apart, decompositions_for_inductor())
    return known[key]


def signature(val: torch.Tensor) -> tuple[object, ...]:
    """What of a tensor decides how a function of it is traced."""
    return tuple(val.shape), tuple(val.stride()), val.dtype, val.device


def name_of(target: Callable[..., Any]) -> str | None:
    """``reshape`` for ``aten.reshape.default``."""
    return target._schema.name.split("::")[1] if hasattr(target, "_schema") else None


def rename_all(graph: fx.Graph) -> None:
    """Names without the numbers that replaced nodes left: ``y_1`` is ``y`` again if y is gone."""
    rename_afresh(graph, {n: re.sub(r"(_\d+)+$", "", n.name) for n in graph.nodes if is_call(n)})


def is_call(node: fx.Node) -> bool:
    return node.op == "call_function"
