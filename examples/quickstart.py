"""A table of 569 patients: its rows are cut over 4 ranks, and the numbers are those of one process.

    python examples/quickstart.py
    torchrun --nproc-per-node=4 examples/quickstart.py

Alone it starts 4 processes on this machine, on its GPUs if it has as many; no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import device, launch
from measure import difference, kept_for_backward, largest, mebibytes
from models.table import TableModel
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import mosaic
from mosaic.report.plan import Plan

Arguments = tuple[Tensor, Tensor, int]
SPEC = {"inputs": {"x": "batch rows columns"}, "axes": {"rows": "ring"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--inner", choices=["eager", "inductor"], default="eager")
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", given.ranks))  # those of torchrun, if it started this
    if os.environ.get("RANK", "0") == "0":
        table, _ = patients()
        spec = mosaic.ShardingSpec(**SPEC)
        show_plan(mosaic.explain(new_model(), *table, spec=spec, sp_size=ranks))
    launch(run, ranks, given.inner)


def run(inner: str) -> None:
    """What every rank does."""
    # mosaic.init(sp_size=4) is all that you need. Here "alone", a mesh axis of length 1, stands
    # beside it: the same program on one rank, to compare with.
    world = int(os.environ["WORLD_SIZE"])
    context = mosaic.init(mesh_shape=(1, world), mesh_axes=("alone", "sp"), device=device())
    table, targets = patients(context.device)
    model = new_model().to(context.device)

    def measure(called: Callable[..., Tensor]) -> Result:
        return measured(called, model, table, targets)

    def compiled(mesh_axis: str) -> Callable[..., Tensor]:
        options = {"spec": mosaic.ShardingSpec(**SPEC, mesh_axis=mesh_axis), "inner": inner}
        return torch.compile(model, backend="mosaic", options=options)

    one = [measure(model), measure(compiled("alone"))] if context.rank() == 0 else []
    dist.barrier()
    sharded = measure(compiled("sp"))
    sharded.kept = int(largest(sharded.kept, context.device))
    if context.rank() == 0:
        show_results(*one, sharded, world, inner)


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return TableModel().double()


def patients(device: torch.device | str = "cpu") -> tuple[Arguments, Tensor]:
    """The model's arguments (30 measurements of each patient, the diagnoses of the training rows,
    which come first, and their number), and the diagnoses of the test rows."""
    features, diagnoses = load_breast_cancer(return_X_y=True)
    parts = train_test_split(features, diagnoses, random_state=0, stratify=diagnoses)
    train, test, known, asked = (torch.from_numpy(part).to(device) for part in parts)
    return (torch.cat([train, test])[None], known[None].double(), len(train)), asked


@dataclass
class Result:
    loss: Tensor
    gradients: list[Tensor]
    kept: int
    first: float
    step: float


def measured(
    called: Callable[..., Tensor], model: nn.Module, table: Arguments, targets: Tensor
) -> Result:
    """Loss, gradients, bytes kept for backward, and the time of the first and of a later step."""

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = F.cross_entropy(called(*table).squeeze(0), targets)
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        if loss.is_cuda:
            torch.cuda.synchronize()  # for the times
        return loss.detach(), gradients

    times = [time.perf_counter()]
    step()
    times.append(time.perf_counter())
    given = [*model.parameters(), *table[:2], targets]
    (loss, gradients), kept = kept_for_backward(step, given)
    times.append(time.perf_counter())
    return Result(loss, gradients, kept, *(b - a for a, b in pairwise(times)))


# --- what rank 0 prints -------------------------------------------------------------------------


def show_plan(plan: Plan) -> None:
    title = f"axis {plan.axis} over {plan.ranks} ranks: {plan.layout}"
    table = new_table(title, "attention", "attends over", "method", "sent by each rank")
    for found in plan.attentions:
        over = f"{found.axis or 'another dim'}, {found.queries} x {found.keys}"
        table.add_row(found.source, over, found.method, mebibytes(found.bytes))
    show(table)


def show_results(plain: Result, alone: Result, sharded: Result, ranks: int, inner: str) -> None:
    results = (plain, alone, sharded)
    names = ("plain PyTorch", "Mosaic, 1 rank", f"Mosaic, {ranks} ranks")
    table = new_table("", "", *names)
    table.add_row("loss", *(f"{r.loss.item():.12f}" for r in results))
    table.add_row("kept for backward, each rank", *(mebibytes(r.kept) for r in results))
    table.add_row("  of plain PyTorch", *(f"{r.kept / plain.kept:.1%}" for r in results))
    table.add_row("  of Mosaic, 1 rank", "", *(f"{r.kept / alone.kept:.1%}" for r in results[1:]))
    table.add_row(f"first step, inner={inner}", *(f"{r.first:.2f} s" for r in results))
    table.add_row("a later step", *(f"{r.step:.2f} s" for r in results))
    show(table)
    loss = difference([plain.loss], [sharded.loss])
    gradients = difference(plain.gradients, sharded.gradients)
    show(
        f"largest difference to plain PyTorch: loss {loss:.1e}, "
        f"all {len(plain.gradients)} gradients {gradients:.1e}"
    )


def show(what: object) -> None:
    """In colour in a terminal, plain and never folded in a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(what, end="\n\n")


def new_table(title: str, first: str, *others: str) -> Table:
    plain = not Console().is_terminal
    style = None if plain else box.SIMPLE_HEAD
    table = Table(title=title, title_justify="left", box=style, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


if __name__ == "__main__":
    main()
