"""Trains a small GPT, letter by letter, on the help texts that come with Python.

    python examples/train_gpt.py --ranks 4 --steps 60
    torchrun --nproc-per-node=4 examples/train_gpt.py --sp-size 2

The second trains on two batches at a time, each over 2 ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from launch import device, launch
from models.gpt import GPT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import mosaic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start")
    parser.add_argument("--sp-size", type=int, help="ranks that share one text")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=256, help="letters of one text")
    parser.add_argument("--batch", type=int, default=4, help="texts per step")
    parser.add_argument("--inner", choices=["eager", "inductor"], default="eager")
    given = parser.parse_args()
    launch(run, given.ranks, given)


def run(given: argparse.Namespace) -> None:
    """What every rank does: plain single-device training, but for three lines of Mosaic."""
    ranks = mosaic.init(given.sp_size, device=device())
    text = letters().to(ranks.device)
    torch.manual_seed(0)  # ranks that share a text must build the same model
    model = GPT(vocab=128, context=given.length, embed=128, layers=2, dropout=0.1)
    model.to(ranks.device)
    spec = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
    options = {"spec": spec, "inner": given.inner}
    compiled = torch.compile(model, backend="mosaic", options=options)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Ranks that share a text must draw the same one: seed by dp_rank, never by the rank.
    texts = samples(text, given.batch, given.length, seed=ranks.dp_rank)
    losses: list[float] = []
    begin = time.perf_counter()
    with progress(quiet=ranks.rank() > 0 or ranks.dp_rank > 0) as bar:
        task = bar.add_task("compiling", total=given.steps, loss="")
        for ids in (next(texts) for _ in range(given.steps)):
            _, loss = compiled(ids, ids)
            loss.backward()
            average_over_replicas(model, ranks)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == 1:
                compiled_at = time.perf_counter()
            bar.update(task, advance=1, description="training", loss=f"loss {losses[-1]:.3f}")
    if ranks.rank() == ranks.dp_rank == 0:
        report(losses, given, ranks, compiled_at - begin, time.perf_counter() - compiled_at)


def letters() -> Tensor:
    """Half a million letters of English, as numbers below 128."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode("ascii", "ignore")))


def samples(text: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch,), generator=draw)
        yield torch.stack([text[i : i + length] for i in starts.tolist()])


def average_over_replicas(model: GPT, ranks: mosaic.MosaicContext) -> None:
    """What DistributedDataParallel does; along sp there is nothing to do, gradients are whole."""
    if ranks.dp_size > 1:
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad, group=ranks.group("dp"))
            parameter.grad /= ranks.dp_size


def progress(quiet: bool) -> Progress:
    """Nothing is drawn on the other ranks, or in a pipe."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    console = Console()
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)


def report(
    losses: list[float],
    given: argparse.Namespace,
    ranks: mosaic.MosaicContext,
    compiling: float,
    training: float,
) -> None:
    last = losses[-10:]
    tokens = (len(losses) - 1) * given.batch * given.length * ranks.dp_size
    print(
        f"loss before {losses[0]:.3f}, after {len(losses)} steps {sum(last) / len(last):.3f}"
        f" (mean of the last {len(last)})\n"
        f"first step {compiling:.1f} s, then {tokens / max(training, 1e-9):,.0f} tokens/s"
        f" on {ranks.size()} x {ranks.dp_size} ranks ({ranks.device.type})"
    )


if __name__ == "__main__":
    main()
