"""Runs passes in order: each is counted, timed and checked."""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import MosaicError, ShardingError
from mosaic.graph.ops import is_effect
from mosaic.graph.sequence import is_start
from mosaic.torch_private import HigherOrderOperator

log = logging.getLogger(__name__)
Pass = Callable[[fx.Graph, Any], int]
Observer = Callable[[str, str, fx.Graph, Any], None]

#: Called with (pass, kind, graph, context) after each pass; before the first with "" for the pass.
OBSERVERS: list[Observer] = []


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph."""

    name: str
    graph: str  # "global", "forward" or "backward"
    rewrites: int
    seconds: float

    def __str__(self) -> str:
        took = f"{self.seconds * 1e3:>8.1f} ms"
        return f"{self.name:<18} {self.graph:<9} {self.rewrites:>5} rewrites {took}"


def run_passes(
    passes: Sequence[Pass], graph: fx.Graph, context: Any, kind: str
) -> list[PassReport]:
    """Run ``passes`` on ``graph``; an error says in which of them it happened."""
    reports = []
    observe("", kind, graph, context)
    for number, step in enumerate(passes, 1):
        start = time.perf_counter()
        try:
            rewrites = step(graph, context)
            verify(graph, step.__name__)
        except MosaicError:
            raise
        except Exception as error:
            error.add_note(
                f"in pass {number} of {len(passes)}, {step.__name__}, of the {kind} graph"
            )
            raise
        reports.append(PassReport(step.__name__, kind, rewrites, time.perf_counter() - start))
        log.debug("%s", reports[-1])
        observe(step.__name__, kind, graph, context)
    return reports


def without_those_off(passes: Sequence[Pass], optional: Sequence[Pass]) -> list[Pass]:
    """All passes but those that ``MOSAIC_OFF=name,name`` leaves out; only ``optional`` ones can be.
    Raises ShardingError for other names."""
    off = {name.strip() for name in os.environ.get("MOSAIC_OFF", "").split(",")} - {""}
    names = [step.__name__ for step in optional]
    if unknown := off.difference(names):
        raise ShardingError(
            f"MOSAIC_OFF names what is no optional pass: {', '.join(sorted(unknown))}",
            fix=f"choose from {', '.join(names)}; the other passes are needed",
        )
    return [step for step in passes if step.__name__ not in off]


def observe(after: str, kind: str, graph: fx.Graph, context: Any) -> None:
    for observer in OBSERVERS:
        observer(after, kind, graph, context)


def verify(graph: fx.Graph, after: str) -> None:
    """Every tensor node has a value, and every wait follows its collective."""
    graph.lint()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if "val" not in node.meta and not needs_no_value(node):
            raise AssertionError(f"after {after}: {node.name} has no value")
        if is_start(node) and isinstance(node.meta["val"], torch.Tensor) and not node.users:
            raise AssertionError(f"after {after}: nobody waits for {node.name}")


def needs_no_value(node: fx.Node) -> bool:
    """Checks give nothing; of the ops that AOTAutograd wraps (to draw the same numbers when it
    recomputes, to keep effects in order) torch writes no value down."""
    source = node.args[0] if node.target is operator.getitem else node
    return is_effect(node) or isinstance(getattr(source, "target", None), HigherOrderOperator)
