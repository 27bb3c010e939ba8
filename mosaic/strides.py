"""Ops that read memory instead of a tensor: what they mean depends on strides, which no program of
ours keeps. They are told of a tensor whose strides they made themselves, or refused.

    y = as_strided(x, size, stride)  ->  y = as_strided(contiguous(permute(x, order)), size, stride)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.errors import UnsupportedError
from mosaic.rewrite import insert
from mosaic.source import where

aten = torch.ops.aten

STRIDED = (aten.as_strided.default, aten.as_strided_copy.default)
WRITTEN = aten.as_strided_scatter.default


def pin_strides(graph: fx.Graph) -> int:
    """Give every ``as_strided`` an operand that lies in memory as the user's did."""
    found = [n for n in graph.nodes if n.target in (*STRIDED, WRITTEN)]
    for node in found:
        pin(graph, node)
    return len(found)


def pin(graph: fx.Graph, node: fx.Node) -> None:
    defaults: tuple[Any, ...] = (None,)
    x, *source, size, stride, offset = tuple(node.args) + defaults[len(node.args) - arity(node) :]
    val = x.meta["val"]
    order = in_memory(val)
    offset = 0 if offset is None else offset - val.storage_offset()
    if order is None or not 0 <= offset <= val.numel() - reach(size, stride):
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
    node.args = (dense, *source, size, stride, offset)
    if node.target is WRITTEN:
        undo_order(graph, node, order)


def arity(node: fx.Node) -> int:
    """How many arguments there are before the offset, which may be left out."""
    return 4 if node.target is WRITTEN else 3


def undo_order(graph: fx.Graph, node: fx.Node, order: list[int]) -> None:
    back = sorted(range(len(order)), key=order.__getitem__)
    with graph.inserting_after(node):
        result = insert(graph, node, aten.permute.default, (node, back))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    node.meta["val"] = node.args[0].meta["val"]


def in_memory(x: Tensor) -> list[int] | None:
    """The dims of x from the outermost in memory; None where it has gaps or shares elements."""
    order = sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d] != 1), reverse=True)
    return order if x.permute(order).is_contiguous() else None


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
