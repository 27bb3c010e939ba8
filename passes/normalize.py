"""Bring the captured graph into one form, so that later passes match little.

    _assert_tensor_metadata(x)            ->  (gone)
    a = x[0:3]; b = x[0:3]                ->  a = x[0:3]            common subexpressions, once
    copy(dst, src)                        ->  expand(_to_copy(src)) copy has no derivative
    as_strided(x, ...)                    ->  as_strided(clone(x), ...) of strides that are known
    sdpa(q, view(clone(expand(unsqueeze(k)))), ...)  ->  sdpa(q, k, ..., enable_gqa=True)

It also marks what later passes ask for: which nodes a gradient flows through, and a number for
every random op.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from mosaic.context import Context
from mosaic.masks.op import PLAIN
from mosaic.rewrite import drop_dead, insert
from mosaic.strides import pin_strides
from mosaic.values import differentiable

aten = torch.ops.aten
DROPPED = {aten._assert_tensor_metadata.default}


def normalize(graph: fx.Graph, context: Context) -> int:
    mark_gradients(graph)
    mark_learned_outputs(graph)
    changed = drop_assertions(graph)
    changed += undo_copies(graph)
    changed += pin_strides(graph)
    changed += undo_repeat_kv(graph)
    changed += merge_common(graph)
    before = len(graph.nodes)
    drop_dead(graph)
    mark_gradients(graph)
    for site, node in enumerate(n for n in graph.nodes if is_random(n)):
        node.meta["site"] = site
    return changed + before - len(graph.nodes)


def drop_assertions(graph: fx.Graph) -> int:
    dead = [n for n in graph.nodes if n.target in DROPPED]
    for node in dead:
        graph.erase_node(node)
    return len(dead)


def undo_copies(graph: fx.Graph) -> int:
    found = graph.find_nodes(op="call_function", target=aten.copy.default)
    for node in found:
        into, source = node.args[0].meta["val"], node.args[1]
        with graph.inserting_before(node):
            to = {"dtype": into.dtype, "device": into.device}
            cast = insert(graph, node, aten._to_copy.default, (source,), to)
            whole = insert(graph, node, aten.expand.default, (cast, list(into.shape)))
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    return len(found)


def undo_repeat_kv(graph: fx.Graph) -> int:
    """K and V travel unexpanded: attention kernels know grouped queries."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=PLAIN):
        k, v = (unexpanded(x) for x in node.args[1:3])
        if k is None or v is None or not is_grouped(*node.args[:3], k, v):
            continue
        node.args = (node.args[0], k, v, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    return count


def is_grouped(q: fx.Node, k: fx.Node, v: fx.Node, *small: fx.Node) -> bool:
    """Whether equal groups of q's heads see one head of ``small``: keys and values of as many."""
    heads, *repeated = (x.meta["val"].shape[1] for x in (q, k, v))
    kv_heads = [x.meta["val"].shape[1] for x in small]
    alike = len(set(kv_heads)) == 1 and len(set(repeated)) == 1
    return alike and bool(repeated[0]) and heads % repeated[0] == 0


def unexpanded(x: fx.Node) -> fx.Node | None:
    """``(b, kv, s, d)`` whose repetition to ``(b, kv * g, s, d)`` is x, if x is one."""
    shape = x.meta["val"].shape
    if len(shape) != 4:
        return None
    if x.target == aten.repeat_interleave.self_int and x.args[2:] and x.args[2] in (1, -3):
        return x.args[0]
    while x.target in (aten.view.default, aten._unsafe_view.default, aten.clone.default):
        x = x.args[0]
    if x.target != aten.expand.default:
        return None
    small = x.args[0]
    while small.target == aten.slice.Tensor and same_shape(small, small.args[0]):
        small = small.args[0]
    if small.target != aten.unsqueeze.default or small.args[1] not in (2, -3):
        return None
    kv = small.args[0].meta["val"].shape
    b, h, g, s, d = x.meta["val"].shape if x.meta["val"].ndim == 5 else (0,) * 5
    return small.args[0] if (b, h, s, d) == kv and shape == (b, h * g, s, d) else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].shape == b.meta["val"].shape


def merge_common(graph: fx.Graph) -> int:
    """Equal calls under equal modes, in the same checkpointed region, are one call."""
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or is_random(node):
            continue
        modes, region = node.meta.get("modes"), node.meta.get("ac_graph_id")
        key = (node.target, str(node.args), str(node.kwargs), modes, region)
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count


def is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or is_random_attention(node)


def is_random_attention(node: fx.Node) -> bool:
    return node.target == PLAIN


def mark_gradients(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.meta["needs_gradient"] = needs_gradient(node)


def mark_learned_outputs(graph: fx.Graph) -> None:
    """Which outputs autograd gives a gradient, if only one of zeros."""
    output = graph.output_node()
    output.meta["learned"] = [
        isinstance(n, fx.Node) and n.meta["needs_gradient"] for n in output.args[0]
    ]


def needs_gradient(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return bool(node.meta.get("requires_grad"))
    if not passes_gradients(node):
        return False
    inside = node.target == operator.getitem or node.meta["modes"].grad
    return inside and any(n.meta.get("needs_gradient") for n in node.all_input_nodes)


def passes_gradients(node: fx.Node) -> bool:
    """Whether an op has a derivative: not a detach, ``zeros_like``, ``new_full``, or integers."""
    if node.op != "call_function" or node.target == aten.detach.default:
        return False
    if re.match(r"new_|\w+_like\b", getattr(node.target, "__name__", "")):
        return False
    values = as_tuple(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and differentiable(v) for v in values)


def as_tuple(val: Any) -> tuple[Any, ...]:
    return tuple(val) if isinstance(val, (tuple, list)) else (val,)
