"""A model in the way of nanoTabPFN, unmodified, on a long table: on one rank and on all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import check_table
import torch
from case_runner import CUDA, Case, Row, Setting
from check_table import COLUMNS, Run

ROWS, MANY = 150_000, 1_000_000
KERNEL = "attention's kernel, 4 x 11 heads of 24"


def title(rows: int, dtype: str, training: bool) -> str:
    return f"table, {rows:,} rows, {dtype}, {'training' if training else 'forward'}"


def ways(ranks: int) -> str:
    return f"{ranks} ranks"


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
    yield Row(title(run.rows, run.dtype, run.training), ways(run.ranks), numbers, took.kind)


def kernel(setting: Setting) -> Iterator[Row]:
    """What the attention of a long table does without anything around it: its rate."""
    n, device = 128 if setting.small else 32_768, setting.here.device
    given = argparse.Namespace(cuda=CUDA)
    q, k, v = (torch.randn(1, 4 * (COLUMNS + 1), n, 24, device=device).bfloat16() for _ in "qkv")
    ms = check_table.milliseconds(
        lambda: check_table.kernels.forward(q, k, v, **check_table.OPTIONS), given
    )
    rate = 4 * n**2 * 96 * (COLUMNS + 1) / ms / 1e9
    yield Row(KERNEL, "forward, bfloat16", {"TFLOP/s": rate})


def cases(p: int) -> list[Case]:
    """The quick ones first."""
    runs = [
        Run(ROWS, dtype, training)
        for dtype in ("bfloat16", "float32")
        for training in (False, True)
    ]
    runs += [Run(MANY, "bfloat16")] if p > 1 else []
    found = [] if p > 1 else [Case("table: kernel", kernel, 30)]
    for run in runs:
        name = f"p = {p}, {title(run.rows, run.dtype, run.training)}"
        found.append(Case(name, partial(train_or_predict, run), 150))
    return found
