"""A model in the way of nanoTabPFN, unmodified, on a long table: on one rank and on all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import check_table
from case_runner import CUDA, Case, Row, Setting
from check_table import COLUMNS, Run

ROWS = 150_000


def train_or_predict(run: Run, setting: Setting) -> Iterator[Row]:
    rows = run.rows // 500 if setting.small else run.rows
    run = Run(rows, run.dtype, run.training, setting.here.size())
    given = argparse.Namespace(
        device=setting.here.device, cuda=CUDA, known=0.9, inner="inductor" if CUDA else "eager"
    )
    took = check_table.measured(run, given, nullcontext())
    numbers = {"s": took.seconds, "GiB": took.peak, "compiled s": took.compiling}
    if not run.training:  # attention over rows, alone: 3 layers of 96, a column for the classes
        pairs = run.rows**2 * given.known
        flops = 3 * 4 * pairs * 96 * (COLUMNS + 1)
        numbers["TFLOP/s"] = flops / run.ranks / took.seconds / 1e12
    what = "training" if run.training else "forward"
    name = f"table, {run.rows:,} rows, {run.dtype}, {what}"
    yield Row(name, f"{run.ranks} ranks", numbers, took.kind)


def cases(p: int) -> list[Case]:
    """The quick ones first."""
    runs = [
        Run(ROWS, dtype, training)
        for dtype in ("bfloat16", "float32")
        for training in (False, True)
    ]
    runs += [Run(1_000_000, "bfloat16")] if p > 1 else []
    name = "table: p = {}, {} rows, {}, {}"
    return [
        Case(
            name.format(p, run.rows, run.dtype, "training" if run.training else "forward"),
            partial(train_or_predict, run),
            150,
        )
        for run in runs
    ]
