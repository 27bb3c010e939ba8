"""Make every collective one that nobody may merge with another or move to the other graph.

    g = gather(y, "6=0:3|3:6")             ->   g = gather(y, "6=0:3|3:6", number=4)

AOTAutograd's next steps go by what this rank alone can see. They merge equal calls, and two calls
may be equal on one rank (its parts of ``y[:, 0]`` and ``y[:, 1]``, both empty) and not on another.
They also move what depends on no tangent (a sum of zeros) from backward to forward and save its
result, where that is smaller on this rank. In both cases the other ranks would wait for ever, or
add up what does not belong together. So each call gets its own number, its place in the joint
graph, and backward's calls are bound to backward. The ranks compare the numbers, too, before the
first run (``mosaic/graph/sequence.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mosaic.torch_private import bind_to_backward

_ops = torch.ops.mosaic

COLLECTIVES = {
    _ops.gather.default,
    _ops.reshard.default,
    _ops.halo.default,
    _ops.halo_sum.default,
    _ops.reduce_across.default,
    _ops.attention.default,
    _ops.attention_backward.default,
    _ops.exchange_heads.default,
}


def pin_collectives(graph: fx.Graph, context: Any) -> int:
    found = [node for node in graph.nodes if node.target in COLLECTIVES]
    for number, node in enumerate(found, 1):
        node.update_kwarg("number", number)
        bind_to_backward(node)
    return len(found)
