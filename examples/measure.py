"""What the examples measure: bytes kept for backward, bytes at most, differences to one process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that ops make in it; more than ``budget`` is an error.

    Every storage once, from the op that makes it until nobody holds it. What an op holds while it
    runs (a kernel's workspace) is not seen.
    """

    def __init__(self, budget: float = float("inf")) -> None:
        super().__init__()
        self.budget, self.live, self.peak = budget, 0, 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles in this mode, and it sees the ops of what is compiled."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        old = {storage._cdata for x in given for storage in held_by(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            for storage in held_by(x) if isinstance(x, Tensor) else ():
                if storage._cdata not in old:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self._seen or storage.device.type == "meta":
            return

        def free(_: object) -> None:
            self.live -= size
            del self._seen[at]

        self._seen[at] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.live > self.budget:
            raise MemoryError(
                f"{mebibytes(self.live)} of tensors, more than {mebibytes(self.budget)}"
            )


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
