"""How each attention is done: its axis's method with the numbers filled in, or another one.

    y = sdpa(q, k, v)   # Ulysses(), 6 heads, 4 ranks   ->   ulysses(2) x ring(stages=2)

Whole keys need no exchange: such an attention is "local" whatever the axis's method is. A method
that cannot do an attention exactly hands it over, and the plan has a line that says why; as it has
for what "auto" chose.
"""

from __future__ import annotations

from torch import fx

from mosaic.attention.way import Facts, Way, way_between
from mosaic.context import Context, device_memory
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
    facts = Facts(
        p=world.size,
        shape=found.shape,
        has_rows=found.has_rows,
        heads_are_cut=found.heads is not None,
        sizes=tuple(world.sizes.items()),
        node_size=world.node_size,
        memory=device_memory(),
    )
    return way_between(found.method, facts, found.query, found.key)
