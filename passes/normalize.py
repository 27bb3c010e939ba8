"""Bring the captured graph into one form, so that later passes match little.

    _assert_tensor_metadata(x)            ->  (gone)
    a = x[0:3]; b = x[0:3]                ->  a = x[0:3]            common subexpressions, once
    copy(dst, src)                        ->  expand(_to_copy(src)) copy has no derivative
    broadcast_tensors(x, y)[0]            ->  x                     where y's shape adds nothing
    with no_grad: x[0:3]                  ->  detach(x)[0:3]        no rule need know of no_grad
    as_strided(x, ...)                    ->  as_strided(clone(x), ...) of strides that are known
    sdpa(q, view(clone(expand(unsqueeze(k)))), ...)  ->  sdpa(q, k, ..., enable_gqa=True)

It also marks what later passes ask for: which nodes a gradient flows through, a number for every
random op, and what eager mode says of the outputs beside their values.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import drop_dead, insert
from mosaic.graph.ops import differentiable
from mosaic.graph.strides import from_outermost, pin_strides, shares_elements
from mosaic.masks.op import ATTENTIONS
from mosaic.partition.context import Context, Output

aten = torch.ops.aten
DROPPED = {aten._assert_tensor_metadata.default}
DROPOUTS = {
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
}
#: The schemas of these say nothing of views.
LISTS_OF_VIEWS = {
    aten.broadcast_tensors.default,
    aten.meshgrid.default,
    aten.meshgrid.indexing,
    aten.atleast_1d.Sequence,
    aten.atleast_2d.Sequence,
    aten.atleast_3d.Sequence,
}


def normalize(graph: fx.Graph, context: Context) -> int:
    changed = undo_identities(graph)
    mark_gradients(graph)
    context.outputs = outputs_of(graph)
    changed += detach_without_grad(graph)
    changed += drop_assertions(graph)
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


def undo_identities(graph: fx.Graph) -> int:
    """Capture takes what an op hands back unchanged for the op's own result: under ``no_grad`` a
    loss of ``y`` would cost ``y`` its gradient."""
    count = 0
    for node in list(graph.nodes):
        x = handed_back(node)
        if x is not None and same_kind(x, node):
            node.replace_all_uses_with(x)
            graph.erase_node(node)
            count += 1
    return count


def handed_back(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` is, if it has that one's shape and dtype."""
    if node.target == aten.type_as.default:
        return node.args[0]
    if node.target in DROPOUTS and (node.args[1] == 0 or not node.args[2]):
        return node.args[0]
    if node.target == operator.getitem and node.args[0].target in LISTS_OF_VIEWS:
        return node.args[0].args[0][node.args[1]]
    return None


def detach_without_grad(graph: fx.Graph) -> int:
    """What is read under ``no_grad`` passes no gradient on, not even through a slice of everything,
    for which rules write nothing. Nothing is done where no gradient is recorded at all."""
    flows = [n for n in graph.nodes if n.meta["needs_gradient"]]
    if all(n.op == "placeholder" for n in flows):
        return 0
    count = 0
    for x in flows:
        readers = [n for n in x.users if n.op == "call_function" and not records_gradients(n)]
        readers = [n for n in readers if n.target != aten.detach.default]
        if not readers:
            continue
        first = min(readers)
        with graph.inserting_before(first):
            cut = insert(graph, first, aten.detach.default, (x,))
        x.replace_all_uses_with(cut, delete_user_cb=readers.__contains__)
        count += 1
    return count


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
    for node in [node for node in graph.nodes if node.target in ATTENTIONS]:
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


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    old, new = a.meta["val"], b.meta["val"]
    return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


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
    return node.target in ATTENTIONS


def outputs_of(graph: fx.Graph) -> tuple[Output, ...]:
    """What eager mode says of the outputs. A view requires a gradient under ``no_grad``, too,
    although it passes none on."""
    requires = requiring(graph, or_view=True)
    return tuple(Output(n in requires, order_of(n)) for n in graph.output_node().args[0])


def order_of(node: Any) -> tuple[int, ...]:
    val = node.meta["val"] if isinstance(node, fx.Node) else None
    if not isinstance(val, torch.Tensor) or shares_elements(val):
        return ()
    return tuple(from_outermost(val))


def mark_gradients(graph: fx.Graph) -> None:
    """Through which nodes a gradient flows."""
    needs = requiring(graph)
    for node in graph.nodes:
        node.meta["needs_gradient"] = node in needs


def requiring(graph: fx.Graph, or_view: bool = False) -> set[fx.Node]:
    required: set[fx.Node] = set()
    for node in graph.nodes:
        if requires_gradient(node, required, or_view):
            required.add(node)
    return required


def requires_gradient(node: fx.Node, required: set[fx.Node], or_view: bool) -> bool:
    """Whether a node requires a gradient, given which nodes before it do."""
    if node.op == "placeholder":
        return bool(node.meta.get("requires_grad"))
    if not passes_gradients(node) or required.isdisjoint(node.all_input_nodes):
        return False
    if node.target == operator.getitem and node.args[0].target in LISTS_OF_VIEWS:
        return node.args[0].args[0][node.args[1]] in required  # each is a view of its own operand
    return records_gradients(node) or (or_view and is_view(node))


def records_gradients(node: fx.Node) -> bool:
    """Whether an op ran with gradients enabled."""
    modes = node.meta.get("modes")
    return node.target == operator.getitem or modes is None or modes.grad


def is_view(node: fx.Node) -> bool:
    """Whether an op gives a view of its operand."""
    if node.target in LISTS_OF_VIEWS:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(x.alias_info is not None for x in schema.returns)


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
