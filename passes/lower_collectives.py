"""Mosaic's own collectives (``mosaic::gather`` and others) become functional collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import mosaic.runtime.collectives  # noqa: F401 (registers the ops)
from mosaic.graph.emit import splice
from mosaic.layout import Shard
from mosaic.runtime import comm


def _gather(x: Tensor, spec: str) -> Tensor:
    return comm.gather_program(x, Shard.decode(spec))


def _reshard(x: Tensor, source: str, target: str) -> Tensor:
    return comm.reshard_program(x, Shard.decode(source), Shard.decode(target))


def _halo(x: Tensor, source: str, target: str) -> Tensor:
    return comm.halo_program(x, Shard.decode(source), Shard.decode(target))


def _halo_sum(x: Tensor, source: str, target: str) -> Tensor:
    return comm.halo_sum_program(x, Shard.decode(source), Shard.decode(target))


def lower_collectives(graph: fx.Graph, context: Any) -> int:
    """Write out every gather, reshard, halo and reduction.

    Only after AOTAutograd's partitioner: it saves the result of each collective that it sees.
    """
    programs: dict[Any, Callable[..., Any]] = {
        torch.ops.mosaic.gather.default: _gather,
        torch.ops.mosaic.reshard.default: _reshard,
        torch.ops.mosaic.halo.default: _halo,
        torch.ops.mosaic.halo_sum.default: _halo_sum,
        torch.ops.mosaic.reduce_across.default: comm.reduced,
    }
    found = [node for node in graph.nodes if node.target in programs]
    for node in found:
        result = splice(graph, node, programs[node.target], node.args, dict(node.kwargs))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(found)
