"""Goldens: one process that believes to be rank 1 of 4, and texts that a reviewer can read.

To write them again: ``EXPECTTEST_ACCEPT=1 pytest tests/golden``; then review the diff as code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from expecttest import assert_expected_inline
from torch import fx

from mosaic.frontend.explain import explain
from mosaic.graph import pipeline
from mosaic.partition.context import Context
from mosaic.partition.interpreter import Axis
from mosaic.report.plan import Plan


@pytest.fixture
def check() -> Callable[[str, str], None]:
    """``check(text, golden)``: the golden stands in the test, and ends with a newline."""

    def compare(text: str, expected: str) -> None:
        assert_expected_inline(f"{text}\n", expected, skip=1)

    return compare


@pytest.fixture
def planned() -> Callable[..., Plan]:
    """``planned(fn, *args)`` is the plan of rank 1 of 4 (or of ``rank``)."""

    def plan(fn: Callable[..., Any], *args: Any, rank: int = 1, **kwargs: Any) -> Plan:
        return explain(fn, *args, sp_size=4, rank=rank, **kwargs)

    return plan


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The context of every graph that is compiled."""
    found: list[Context] = []

    def observe(after: str, kind: str, graph: fx.Graph, context: Context) -> None:
        if not after and kind == "global":
            found.append(context)

    monkeypatch.setattr(pipeline, "OBSERVERS", [observe])
    return found


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axis]:
    """The sharded axis as it stood after each pass."""
    found: dict[str, Axis] = {}

    def observe(after: str, kind: str, graph: fx.Graph, context: Context) -> None:
        if context.axes:
            (found[after],) = context.axes

    monkeypatch.setattr(pipeline, "OBSERVERS", [observe])
    return found
