"""``mosaic::attention``, its backward and ``mosaic::exchange_heads`` become explicit: collectives,
kernels and merges."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mosaic.attention import heads
from mosaic.attention.op import backward_program, forward_program
from mosaic.graph.emit import splice
from mosaic.graph.regions import REGION


def lower_attention(graph: fx.Graph, context: Any) -> int:
    """Write out what each attention's method does.

    Only after AOTAutograd's partitioner, which would save every visiting chunk for backward.
    """
    programs: dict[Any, Callable[..., Any]] = {
        torch.ops.mosaic.attention.default: forward_program,
        torch.ops.mosaic.attention_backward.default: backward_program,
        torch.ops.mosaic.exchange_heads.default: heads.program,
    }
    found = [node for node in graph.nodes if node.target in programs]
    for node in found:
        meta = {**node.kwargs, REGION: node.name}
        results = splice(graph, node, programs[node.target], node.args, meta)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{node} is used as a tuple by {user}")
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    return len(found)
