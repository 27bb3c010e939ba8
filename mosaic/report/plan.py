"""The plan that users see: read off the passes' decisions when all is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from mosaic.attention.blocks import FULL
from mosaic.attention.cost import cost_of, size
from mosaic.attention.dense import is_more
from mosaic.attention.problem import AttentionProblem
from mosaic.graph.pipeline import PassReport
from mosaic.graph.source import code, line
from mosaic.layout import Place, Shard
from mosaic.partition.context import Context
from mosaic.partition.values import Collective
from mosaic.report.memory import Memory, Parameter, kept_by, memory_of
from mosaic.report.show import diff
from mosaic.runtime.deferred_tensor import Recipe


@dataclass(frozen=True)
class AttentionReport:
    """One attention: where it stands, what it attends over, and how it is done."""

    source: str
    code: str
    axis: str
    queries: int
    keys: int
    method: str
    mask: str
    bytes: int  # sent by each rank in forward

    def __str__(self) -> str:
        attends = f"{self.axis or 'another dim'} ({self.queries} x {self.keys})"
        mask = self.mask or "full"
        return (
            f"{self.source:<28} {attends:<28} {self.method:<10} {mask:<16} {size(self.bytes):>10}"
        )


@dataclass
class Plan:
    """What Mosaic decided for one graph. ``print(plan)`` shows it."""

    axis: str
    layout: str
    ranks: int
    attentions: list[AttentionReport]
    collectives: list[Collective]
    passes: list[PassReport]
    gathered: list[str]
    notes: list[str]
    outputs: list[tuple[Place, ...]] = field(default_factory=list)  # how each of them is cut
    recipes: list[Recipe | None] = field(default_factory=list)  # of outputs that are deferred
    parameters: list[Parameter] = field(default_factory=list)  # and buffers
    others: list[Plan] = field(default_factory=list)  # of the same program's other graphs
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    steps: dict[str, tuple[str, str]] = field(default_factory=dict)  # pass: listings around it

    @property
    def diffs(self) -> dict[str, str]:
        """What each pass changed, if ``explain`` watched; ``"overlap backward"`` in backward."""
        return {step: diff(before, after) for step, (before, after) in self.steps.items()}

    @property
    def kept(self) -> int:
        """Bytes that one rank keeps from forward to backward, beside parameters and inputs."""
        return self.memory().kept

    def memory(
        self, *, shards: int = 1, moments: int = 2, dtype: torch.dtype | None = None
    ) -> Memory:
        """What one rank holds in a training step, by kind. ``shards``: ranks over which FSDP2 cuts
        parameters; ``moments``: tensors that the optimizer keeps for each (AdamW's two);
        ``dtype``: of parameters, gradients and moments, if not that which the graph has."""
        kept = [
            kept_by(graphs["local"], graphs["forward"], graphs["backward"], shards)
            for graphs in (plan.graphs for plan in (self, *self.others))
            if "backward" in graphs
        ]
        parameters = [p for plan in (self, *self.others) for p in plan.parameters]
        return memory_of(parameters, kept, shards=shards, moments=moments, dtype=dtype)

    @property
    def seconds(self) -> float:
        """Time in our passes."""
        return sum(p.seconds for p in self.passes)

    def __str__(self) -> str:
        head = f"axis {self.axis} over {self.ranks} ranks: {self.layout}" if self.axis else "whole"
        rows = [head, "", "attentions: line, attends over, method, mask, bytes sent by each rank"]
        rows += [f"  {a}" for a in self.attentions] or ["  none"]
        rows += ["", "other collectives: op, axis, bytes, why"]
        rows += [f"  {row}" for row in self.collective_rows()] or ["  none"]
        if "backward" in self.graphs:
            rows += ["", "held by each rank, with AdamW's moments and no parameter cut"]
            rows += [f"  {row}" for row in str(self.memory()).splitlines()]
        rows += ["", f"passes: {self.seconds:.2f} s"]
        rows += [f"  {p}" for p in self.passes]
        rows += [f"gathered: {g}" for g in self.gathered] + self.notes
        return "\n".join(rows)

    def collective_rows(self) -> list[str]:
        """The collectives, equal ones counted."""
        alike = Counter((c.op, c.axis, c.bytes, c.why, c.source) for c in self.collectives)
        return [
            f"{op:<11} {axis:<8} {size(n):>10}  {why}  [{source}]"
            + (f"  x{times}" if times > 1 else "")
            for (op, axis, n, why, source), times in alike.items()
        ]


#: Called with every plan that is made.
LISTENERS: list[Callable[[Plan], None]] = []


@contextmanager
def plans() -> Iterator[list[Plan]]:
    """The plans of the graphs that are compiled meanwhile, in their order, with their graphs.

    ``with mosaic.plans() as plans: loss = compiled(x)``, then ``print(*plans)``.
    """
    found: list[Plan] = []
    LISTENERS.append(found.append)
    try:
        yield found
    finally:
        LISTENERS.remove(found.append)


def plan_of(context: Context, passes: list[PassReport]) -> Plan:
    return Plan(
        axis=", ".join(axis.name for axis in context.axes),
        layout=", ".join(str(axis.layout) for axis in context.axes),
        ranks=context.world.size,
        attentions=[report(a, n) for a, n in context.attentions],
        collectives=context.collectives,
        passes=passes,
        gathered=[f"{why} [{line(node)}]" for why, node in context.gathered],
        notes=[*context.notes, *mask_notes(context), *key_notes(context)],
        outputs=[tuple(Shard.decode(x).place for x in shards) for shards in context.output_shards],
        recipes=context.recipes,
    )


def mask_notes(context: Context) -> list[str]:
    """How a GPU's kernels get each mask that is more than a band; alike layers are said once."""
    notes = []
    for found, node in context.attentions:
        if node.meta["val"].device.type == "cuda" and is_more(found.mask, found.band):
            how = f"made dense: {found.dense}" if found.dense else "computed in the kernel"
            notes.append(f"mask: {found.mask}: {how} [{line(node)}]")
    return list(dict.fromkeys(notes))


def key_notes(context: Context) -> list[str]:
    """What of its keys an attention sends where queries see few; alike layers are said once."""
    notes = []
    for found, node in context.attentions:
        if found.strategy.inter.rows * found.strategy.intra.rows == 1:
            continue
        full = replace(found, band=FULL, seen=None)
        sent, most = (size(cost_of(x.strategy, x).forward) for x in (found, full))
        if sent != most:
            notes.append(f"keys: {found.mask}: {sent} sent of {most} [{line(node)}]")
        elif found.seen is None and is_more(found.mask, found.band):
            why = "what ranks see of them is not known when compiling"
            notes.append(f"keys: {found.mask}: all are sent, {most}: {why} [{line(node)}]")
    return list(dict.fromkeys(notes))


def report(found: AttentionProblem, node: fx.Node) -> AttentionReport:
    return AttentionReport(
        source=line(node),
        code=code(node),
        axis=found.axis,
        queries=found.query.n,
        keys=found.key.n,
        method=str(found.strategy),
        mask=found.mask,
        bytes=int(cost_of(found.strategy, found).forward),
    )
