"""What the examples measure: bytes kept for backward, and differences to one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def kept_for_backward(step: Callable[[], Any], given: list[Tensor]) -> tuple[Any, int]:
    """What ``step`` gives, and the bytes of activations it holds between forward and backward.

    Every storage that autograd saves, once each, but those of parameters and inputs. A compiled
    graph is one autograd function, so what its partitioner chose to keep comes through these hooks.
    """
    storages: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        for storage in held_by(x):
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = step()
    for x in given:
        for storage in held_by(x):
            storages.pop(storage.data_ptr(), None)
    return result, sum(storages.values())


def held_by(x: Any) -> list[torch.UntypedStorage]:
    """The memory of a tensor on this rank, also of one that wraps others (a ShardedTensor)."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x.untyped_storage()]
    names, _ = x.__tensor_flatten__()
    return [storage for name in names for storage in held_by(getattr(x, name))]


def largest(n: float, device: torch.device | str = "cpu") -> float:
    """Over all ranks."""
    found = torch.tensor(n, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def mebibytes(n: float) -> str:
    return f"{n / 2**20:.1f} MiB"


def gibibytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True))


def relative(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest difference in a tensor, by the largest number in it (or 1, if that is more)."""
    pairs = zip(expected, actual, strict=True)
    return max(difference([a], [b]) / max(1, a.abs().max().item()) for a, b in pairs)
