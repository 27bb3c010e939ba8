"""What it costs to compare inputs across ranks before every run, and parameters before the first.

    torchrun --nproc-per-node 2 tests/gpu/check_data.py     # on one GPU: --nproc-per-node 1

For arguments of some sizes the milliseconds of the host and of the device; of steps of some
milliseconds with a comparison and without; the seconds and the memory for parameters of 2 GiB. With
several ranks another batch on the last rank must be found before the run's results are given. Exits
1 if it is not. On CPUs (gloo) the parameters are few.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

import mosaic
from mosaic.api.errors import ShardingError
from mosaic.frontend.data_check import DataCheck
from mosaic.graph.inputs import Input

CUDA = torch.cuda.is_available()
ARGUMENTS = {
    "4,096 tokens": lambda: torch.randint(0, 9, (1, 4096)),
    "131,072 tokens": lambda: torch.randint(0, 9, (1, 131072)),
    "a table of 150,000 x 10": lambda: torch.randn(1, 150000, 10),
}


def check_of(context: mosaic.MosaicContext, state: bool = False) -> DataCheck:
    given = [Input(0, "L['x']", state)]
    arguments, parameters = ([], given) if state else (given, [])
    return DataCheck(context, dist.group.WORLD, "facts", arguments, parameters, True)


def finished() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(run: Callable[[], None]) -> tuple[float, float]:
    """The medians of what the host takes, and of what host and device take."""
    host, both = [], []
    for _ in range(25):
        start = finished()
        run()
        host.append(time.perf_counter() - start)
        both.append(finished() - start)
    return 1e3 * median(host[5:]), 1e3 * median(both[5:])


def of_steps(context: mosaic.MosaicContext, products: int) -> tuple[float, float]:
    """Milliseconds of a step of so many products of matrices without a comparison and with one:
    what the device lacks while the host waits. All ranks begin together."""
    check, x = check_of(context), torch.ones(1, 4096, dtype=torch.int64, device=context.device)
    weight = torch.eye(8192 if CUDA else 64, device=context.device)

    def step(compared: bool) -> None:
        if compared:
            check([x])
        out = weight
        for _ in range(products):
            out = out @ weight
        if compared:
            check.settle()

    found = []
    for compared in (False, True):
        for count in (5, 30):  # the first are not counted
            dist.barrier()
            start = finished()
            for _ in range(count):
                step(compared)
            took = (finished() - start) / count
        found.append(1e3 * took)
    return found[0], found[1]


def says(check: DataCheck, x: Tensor) -> str:
    try:
        check([x])
        check.settle()
    except ShardingError as error:
        return str(error)
    return ""


def finds_another_batch(context: mosaic.MosaicContext) -> bool:
    """In the third run, and says so in it."""
    check, x = check_of(context), torch.randn(1, 999, 3, device=context.device)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    batches = [x, x + 1, x + 2 + is_last]
    dist.broadcast(x, 0)  # the seeds are equal, and so is x: only that all have come
    return [bool(says(check, batch)) for batch in batches] == [False, False, True]


def main() -> int:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if CUDA else "gloo")
    context = mosaic.init(sp_size=None)
    torch.manual_seed(0)
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(f"torch {torch.__version__}, {dist.get_world_size()} x {context.device.type}")
    for name, make in ARGUMENTS.items():
        check, x = check_of(context), make().to(context.device)
        host, both = milliseconds(lambda check=check, x=x: check([x]))
        say(f"{name:<26}{host:8.2f} ms of the host, {both:8.2f} ms in all", flush=True)
    for products in (1, 4, 16):
        without, compared = of_steps(context, products)
        say(f"steps of {without:8.2f} ms take {compared:8.2f} ms with a comparison", flush=True)
    weight = torch.ones(1 << (30 if CUDA else 22), dtype=torch.bfloat16, device=context.device)
    before = torch.cuda.max_memory_allocated() if CUDA else 0
    start = finished()
    check_of(context, state=True)([weight])
    took = finished() - start
    beside = (torch.cuda.max_memory_allocated() - before) / 2**20 if CUDA else 0.0
    say(
        f"parameters of {weight.nbytes / 2**30:.2f} GiB: {took:.3f} s, {beside:.0f} MiB beside them"
    )
    right = dist.get_world_size() == 1 or finds_another_batch(context)
    say("all right" if right else "another batch on one rank was not found")
    context.shutdown()
    dist.destroy_process_group()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
