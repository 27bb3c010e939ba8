"""What ranks do in tests. A job goes to the ranks by its name, so it must be importable there."""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist

from mosaic.frontend import user_warnings
from mosaic.runtime import mesh


def sum_of_ranks(dtype: torch.dtype) -> torch.Tensor:
    total = torch.full((3,), dist.get_rank(), dtype=dtype)
    dist.all_reduce(total)
    return total


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("this rank is unhappy")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def mesh_places(sp_size: int) -> tuple[int, int, int, int, torch.Tensor]:
    """Where each rank stands, and the sum of the world ranks along sp."""
    context = mesh.init(sp_size=sp_size)
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total, group=context.group("sp"))
    return context.dp_rank, context.dp_size, context.rank(), context.size(), total


def warned_once() -> list[str]:
    """What a listener hears of a warning that is said once per process, twice."""
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    user_warnings.log.addHandler(listener)
    for _ in range(2):
        user_warnings.once("once")
    user_warnings.log.removeHandler(listener)
    return heard


def gradient_of_square(x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (x @ x.T).sum().backward()
    assert x.grad is not None
    return x.grad
