"""Ops that read memory instead of a tensor: what they mean depends on strides, which no program of
ours keeps. They are told of a tensor whose strides they made themselves, or refused.

    y = as_strided(x, size, stride)  ->  y = as_strided(contiguous(permute(x, order)), size, stride)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mosaic.api.errors import UnsupportedError
from mosaic.graph.emit import insert
from mosaic.graph.source import where

aten = torch.ops.aten

STRIDED = (aten.as_strided.default, aten.as_strided_copy.default)
#: How the tracer writes into such a view; torch's derivative of the first is wrong, and the second
#: loses what no window holds.
WRITTEN = (aten.as_strided_scatter.default, aten.unfold_backward.default)


def pin_strides(graph: fx.Graph) -> int:
    """Give every ``as_strided`` an operand that lies in memory as the user's did."""
    for node in graph.nodes:
        if node.target in WRITTEN and not fills_all(node):
            raise UnsupportedError(
                "a view that as_strided or unfold made is written to",
                where=where(node),
                fix="write into slices (x[:, 2:4] = y), or into a copy: view.clone()",
            )
    found = [n for n in graph.nodes if n.target in STRIDED]
    for node in found:
        pin(graph, node)
    return len(found)


def fills_all(node: fx.Node) -> bool:
    """Whether windows lie side by side and hold every element."""
    if node.target is not aten.unfold_backward.default:
        return False
    _, sizes, dim, size, step = node.args
    return size == step and sizes[dim] % size == 0


def pin(graph: fx.Graph, node: fx.Node) -> None:
    x, size, stride, *rest = node.args
    val = x.meta["val"]
    order = in_memory(val)
    given = rest[0] if rest else None
    offset = 0 if given is None else given - val.storage_offset()
    unknown = given is not None and starts_later(graph)
    if order is None or unknown or not 0 <= offset <= val.numel() - reach(size, stride):
        raise UnsupportedError(
            f"{node.target.__name__} reads memory that is not that of its own tensor alone",
            where=where(node),
            tensor=f"{list(val.shape)}, strides {list(val.stride())}",
            read=f"{list(size)}, strides {list(stride)}, from {offset}",
            fix="use unfold, slices or expand, which say what they take of a tensor",
        )
    with graph.inserting_before(node):
        ordered = insert(graph, node, aten.permute.default, (x, order))
        options = {"memory_format": torch.contiguous_format}
        dense = insert(graph, node, aten.clone.default, (ordered,), options)
    node.args = (dense, size, stride, offset)


def starts_later(graph: fx.Graph) -> bool:
    """Whether an input is a view that does not begin where its memory does: it is captured so."""
    return any(n.meta.get("storage_offset") for n in graph.nodes if n.op == "placeholder")


def in_memory(x: Tensor) -> list[int] | None:
    """The dims of x from the outermost in memory; None where it has gaps or shares elements."""
    order = from_outermost(x)
    return order if x.permute(order).is_contiguous() else None


def from_outermost(x: Tensor) -> list[int]:
    """The dims of x by their strides, the largest first."""
    return sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d] != 1), reverse=True)


def reach(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements of memory are reached."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def shares_elements(x: Tensor) -> bool:
    """Whether two elements of x may lie at one place in memory: expanded, unfolded."""
    filled = 1
    for step, n in sorted((x.stride(d), n) for d, n in enumerate(x.shape) if n != 1):
        if step < filled:
            return x.numel() > 0
        filled = step * (n - 1) + filled
    return False
