"""What backward must not run again is kept, whatever budget the user gives to activations.

    out, lse = mosaic.attention(q, k, v, ...)   ->   the same, recompute: MUST_SAVE

``torch._functorch.config.activation_memory_budget`` lets AOTAutograd's partitioner run again in
backward what it would keep otherwise. Our ops are opaque to it: it does not know what an attention
or a loss costs, nor that a collective sends. And a number that is drawn twice is not the same one.
What lies in a checkpoint has its marks already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mosaic.partition.context import Context
from mosaic.torch_private import is_in_backward


def keep_results(graph: fx.Graph, context: Context) -> int:
    kept = [
        node
        for node in graph.nodes
        if is_kept(node.target) and "recompute" not in node.meta and not is_in_backward(node)
    ]
    for node in kept:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(kept)


def is_kept(target: Any) -> bool:
    draws = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return draws or getattr(target, "namespace", "") == "mosaic"
