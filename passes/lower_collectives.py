"""``mosaic::gather`` and ``mosaic::reshard`` become explicit functional collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import mosaic.collectives  # noqa: F401 (registers the ops)
from mosaic.layout import Shard
from mosaic.moves import gather_program, reshard_program
from mosaic.rewrite import splice


def _gather(x: Tensor, spec: str) -> Tensor:
    return gather_program(x, Shard.decode(spec))


def _reshard(x: Tensor, source: str, target: str) -> Tensor:
    return reshard_program(x, Shard.decode(source), Shard.decode(target))


def lower_collectives(graph: fx.Graph, context: Any) -> int:
    """Write out every gather and reshard.

    Only after AOTAutograd's partitioner: it saves the result of each collective that it sees.
    """
    programs: dict[Any, Callable[..., Any]] = {
        torch.ops.mosaic.gather.default: _gather,
        torch.ops.mosaic.reshard.default: _reshard,
    }
    found = [node for node in graph.nodes if node.target in programs]
    for node in found:
        node.replace_all_uses_with(splice(graph, node, programs[node.target], node.args))
        graph.erase_node(node)
    return len(found)
