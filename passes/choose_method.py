"""How each attention is done: its axis's method with the numbers filled in, or another one.

    y = sdpa(q, k, v)   # Ulysses(), 6 heads, 4 ranks   ->   ulysses(2) x ring(stages=2)

Whole keys need no exchange: such an attention is "local" whatever the axis's method is. A method
that cannot do an attention exactly hands it over, and the plan has a line that says why; as it has
for what "auto" chose.
"""

from __future__ import annotations

from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.attention.cost import ITEMSIZE
from mosaic.attention.resolve import Facts, way_between
from mosaic.attention.strategy import Strategy
from mosaic.graph.context import Context
from mosaic.graph.source import where
from mosaic.partition.attention import Attention
from mosaic.runtime.world import device_memory


def choose_method(graph: fx.Graph, context: Context) -> int:
    for found, node in context.attentions:
        if found.is_distributed and context.world.size > 1:
            check_not_empty(node, context)
        node.meta["way"], note = resolved(found, context)
        if note and note not in context.notes:
            context.notes.append(note)
    return sum(found.is_distributed for found, _ in context.attentions)


def check_not_empty(node: fx.Node, context: Context) -> None:
    """Raise ShardingError for an attention in which there is nothing to cut."""
    q, k, v = (list(x.meta["val"].shape) for x in node.args[:3])
    if 0 in (*q, *k, *v):
        empty = next((axis.name for axis in context.axes if axis.layout.n == 0), None)
        raise ShardingError(
            f"axis {empty!r} has length 0" if empty else "an attention of empty tensors is cut",
            where=where(node),
            sizes=f"q {q}, k {k}, v {v}",
            fix="leave the call out where there is nothing to attend to",
        )


def resolved(found: Attention, context: Context) -> tuple[Strategy, str]:
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
    way, note = way_between(found.method, facts, found.query, found.key)
    if way.grad_dtype and ITEMSIZE[way.grad_dtype] < found.shape.itemsize:
        note = f"grad_dtype={way.grad_dtype} is narrower than the keys: it rounds dK and dV"
    return way, note
