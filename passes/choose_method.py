"""How each attention is done: its axis's method with the numbers filled in, or another one.

    y = sdpa(q, k, v)   # Ulysses(), 6 heads, 4 ranks   ->   ulysses(2) x ring(stages=2)

Whole keys need no exchange: such an attention is "local" whatever the axis's method is. A method
that cannot do an attention exactly hands it over, and the plan has a line that says why; as it has
for what "auto" chose.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.attention.cost import ITEMSIZE
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import machine_of, resolve
from mosaic.graph.source import where
from mosaic.partition.context import Context


def choose_method(graph: fx.Graph, context: Context) -> int:
    found, context.attentions = context.attentions, []
    for problem, node in found:
        if problem.axes and context.world.size > 1:
            check_not_empty(node, context)
        node.meta["problem"], note = resolved(problem, context)
        context.attentions.append((node.meta["problem"], node))
        if note and note not in context.notes:
            context.notes.append(note)
    return sum(bool(problem.axes) for problem, _ in found)


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


def resolved(problem: AttentionProblem, context: Context) -> tuple[AttentionProblem, str]:
    """The attention with its strategy, and a note where its axis's method does not do it."""
    machine = machine_of(context.on(problem.mesh))
    strategy, note = resolve(problem.method, problem, machine)
    if strategy.grad_dtype and ITEMSIZE[strategy.grad_dtype] < problem.itemsize:
        note = f"grad_dtype={strategy.grad_dtype} is narrower than the keys: it rounds dK and dV"
    return replace(problem, strategy=strategy), note
