"""How each attention is done: its axis's method with the numbers filled in, or another one.

    y = sdpa(q, k, v)   # Ulysses(), 6 heads, 4 ranks   ->   ulysses(2) x ring(stages=2)

Whole keys need no exchange: such an attention is "local" whatever the axis's method is. A method
that cannot do an attention exactly hands it over, and the plan has a line that says why; as it has
for what "auto" chose.
"""

from __future__ import annotations

import math
import os

import torch
from torch import fx

from mosaic.attention.way import LOCAL, SPLIT_KV, Facts, Way, way_of
from mosaic.context import Context, World
from mosaic.layout import Layout
from mosaic.local.attention import Attention


def choose_method(graph: fx.Graph, context: Context) -> int:
    for found, node in context.attentions:
        node.meta["way"], note = resolved(found, context)
        if note and note not in context.notes:
            context.notes.append(note)
    return sum(found.is_distributed for found, _ in context.attentions)


def resolved(found: Attention, context: Context) -> tuple[Way, str]:
    """How one attention is done, and a note where its axis's method does not do it."""
    world = context.on(found.mesh)
    if not found.is_distributed or is_whole(found.key):
        return LOCAL, ""
    if is_whole(found.query):
        return SPLIT_KV, ""
    facts = Facts(
        p=world.size,
        shape=found.shape,
        has_rows=found.has_rows,
        heads_are_cut=found.heads is not None,
        sizes=world.sizes,
        node_size=node_size(world),
        memory=device_memory(),
    )
    return way_of(found.method, facts)


def node_size(world: World) -> int:
    """How many neighbouring ranks of the mesh axis share a node, by torchrun's word; 0 for all."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    names = list(world.sizes)
    inner = names[names.index(world.mesh_axis) + 1 :] if world.mesh_axis in names else []
    return local // math.prod(world.sizes[name] for name in inner)


def device_memory() -> int:
    """Of a GPU, in bytes, the same on every rank; 0 on the CPU, where it is not the limit."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def is_whole(layout: Layout) -> bool:
    return layout.p > 1 and not layout.is_partition
