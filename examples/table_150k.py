"""A table model on a long table: rows are cut over the ranks, and so is the input they are given.

    python examples/table_150k.py                        # 1,000 rows over 4 processes
    torchrun --nproc-per-node=8 examples/table_150k.py --rows 150000 --dtype bfloat16

No rank ever holds all activations. One process would: what it gives is compared with up to
``--check-up-to`` rows, as plain attention keeps rows x rows scores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import device, launch
from measure import kept_for_backward, largest, mebibytes, relative
from models.table import TableModel
from torch import Tensor

import mosaic
from mosaic.frontend.backend import LISTENERS

#: Of differences, by dtype.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}
Step = tuple[Tensor, list[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--known", type=int, help="rows with a known class; a tenth of them")
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--inner", choices=["eager", "inductor"], help="inductor on GPUs")
    parser.add_argument("--check-up-to", type=int, default=4000, metavar="ROWS")
    given = parser.parse_args()
    launch(run, given.ranks, given)


def run(given: argparse.Namespace) -> None:
    """What every rank does."""
    ranks = mosaic.init(sp_size=None, device=device())
    inner = given.inner or ("inductor" if ranks.device.type == "cuda" else "eager")
    torch.manual_seed(0)
    model = TableModel(layers=given.layers).to(ranks.device, getattr(torch, given.dtype))
    x, y, targets = table(given, ranks.device)
    part = mosaic.distribute(x, 1)
    spec = mosaic.ShardingSpec(inputs={"x": "batch rows columns"}, axes={"rows": "ring"})
    plans: list[mosaic.Plan] = []
    LISTENERS.append(plans.append)  # mosaic.explain would compile the model once more
    compiled = torch.compile(model, backend="mosaic", options={"spec": spec, "inner": inner})

    first = time.perf_counter()
    step(compiled, model, part, y, targets)
    begin = time.perf_counter()
    (loss, gradients), kept = kept_for_backward(
        lambda: step(compiled, model, part, y, targets), [*model.parameters(), part, y, targets]
    )
    end = time.perf_counter()
    kept = int(largest(kept, ranks.device))
    if ranks.rank() == 0:
        show(plans[0], part, kept)
        print(
            f"first step, inner={inner}  {begin - first:.1f} s\na later step  {end - begin:.1f} s"
        )
        if ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            print(f"largest GPU memory in use, rank 0  {mebibytes(peak)}")
    if given.rows > given.check_up_to:
        if ranks.rank() == 0:
            print(f"not compared with one process: more than {given.check_up_to} rows")
        return
    off = 0.0
    if ranks.rank() == 0:
        off = compare(model, (x, y, targets), [loss, *gradients], kept)
    dist.barrier()
    if not largest(off, ranks.device) <= TOLERANCE[given.dtype]:
        raise SystemExit(f"that is too much for {given.dtype}")


def table(given: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, rows, columns), y (1, known rows) and the classes of the other rows.

    The numbers of the table are few; it is what the model makes of each cell that takes memory.
    """
    draw = torch.Generator().manual_seed(1)  # the same table on each rank
    x = torch.randn(1, given.rows, given.columns, generator=draw)
    classes = (x[..., 0] * x[..., 1] > x[..., 2]).long()
    split = given.known or given.rows // 10
    dtype = getattr(torch, given.dtype)
    return x.to(device, dtype), classes[:, :split].to(device, dtype), classes[0, split:].to(device)


def step(
    called: Callable[..., Tensor], model: TableModel, x: Tensor, y: Tensor, targets: Tensor
) -> Step:
    """The loss and all gradients, whole on every rank."""
    loss = F.cross_entropy(called(x, y, y.shape[1]).squeeze(0).float(), targets)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def compare(
    model: TableModel, whole: tuple[Tensor, Tensor, Tensor], got: list[Tensor], kept: int
) -> float:
    """The largest difference to the plain model in this process alone."""
    (loss, gradients), alone = kept_for_backward(
        lambda: step(model, model, *whole), [*model.parameters(), *whole]
    )
    losses, others = relative([loss], got[:1]), relative(gradients, got[1:])
    print(
        f"one process keeps {mebibytes(alone)}: a rank {kept / alone:.1%} of that\n"
        f"largest difference to it: loss {losses:.1e}, all {len(gradients)} gradients {others:.1e}"
    )
    return max(losses, others)


def show(plan: mosaic.Plan, part: mosaic.ShardedTensor, kept: int) -> None:
    world, shape = os.environ["WORLD_SIZE"], list(part.local.shape)
    print(f"axis {plan.axis} over {world} ranks; rank 0 has {shape} of the table\n")
    print(f"{'attention':<32}{'attends over':<26}{'method':<18}{'sent by each rank':>18}")
    for found in plan.attentions:
        over = f"{found.axis or 'columns'}, {found.queries} x {found.keys}"
        print(f"{found.source:<32}{over:<26}{found.method:<18}{mebibytes(found.bytes):>18}")
    print(f"\nkept for backward by each rank  {mebibytes(kept)}")


if __name__ == "__main__":
    main()
