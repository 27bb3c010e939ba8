"""What tensors that share memory on one device share here: what is written to one, all have.

    v = x[:, 3]         # v is made of x: the rank that holds row 3 sends it
    v += 1              # x = select_scatter(x, v + 1, 1, 3): the rank that holds it writes
    x.mul_(2); v        # v is made of x again, as soon as somebody reads it

Their root holds the data. A view knows the op that made it, and by that the op that undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mosaic.runtime.sharded_tensor import ShardedTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """``op(base, **given)``."""

    base: ShardedTensor  # without history: a view does not keep the graph of its base alive
    op: Any
    given: dict[str, Any]


@dataclass
class Memory:
    """``part``: what this rank holds. ``writes``: to a root, how many there were; ``seen``: of
    these, how many a view has."""

    part: Tensor
    view: View | None = None
    is_shared: bool = False  # a compiled graph gave others that are in it, which are not known
    is_viewed: bool = False
    writes: int = 0
    seen: int = 0

    @property
    def root(self) -> Memory:
        return self if self.view is None else self.view.base.memory.root

    def current(self) -> Tensor:
        """``part``, after what was written to the root."""
        if self.view is not None and self.seen != self.root.writes:
            self.part = self.view.op(self.view.base, **self.view.given)._local
            self.seen = self.root.writes
        return self.part


def views_of(base: ShardedTensor, op: Any, given: dict[str, Any], count: int) -> list[View]:
    """How each of ``count`` results of ``op(base, **given)`` is a view."""
    if op not in ONE_OF:
        return [View(base, op, given)] * count
    return [View(base, *ONE_OF[op](i, **given)) for i in range(count)]


def piece(i: int, split_size: int, dim: int = 0) -> tuple[Any, dict[str, Any]]:
    return aten.slice.Tensor, {"dim": dim, "start": i * split_size, "end": (i + 1) * split_size}


def sized_piece(i: int, split_sizes: list[int], dim: int = 0) -> tuple[Any, dict[str, Any]]:
    start, end = sum(split_sizes[:i]), sum(split_sizes[: i + 1])
    return aten.slice.Tensor, {"dim": dim, "start": start, "end": end}


def row(i: int, dim: int = 0) -> tuple[Any, dict[str, Any]]:
    return aten.select.int, {"dim": dim, "index": i}


#: Ops that give many views: which op gives number i of them.
ONE_OF: dict[Any, Callable[..., tuple[Any, dict[str, Any]]]] = {
    aten.split.Tensor: piece,
    aten.split_with_sizes.default: sized_piece,
    aten.unbind.int: row,
}


def reshaped(base: Tensor, new: Tensor, **_: Any) -> Tensor:
    return new.reshape(base.shape)


def swapped(base: Tensor, new: Tensor, dim0: int = 0, dim1: int = 1) -> Tensor:
    return new.transpose(dim0, dim1) if new.ndim > 1 else new


def permuted(base: Tensor, new: Tensor, dims: list[int]) -> Tensor:
    return new.permute(sorted(range(new.ndim), key=lambda d: dims[d] % new.ndim))


#: For the op of a view: ``undo(base, new, **given)`` is the base after ``new`` was written to it.
UNDO: dict[Any, Callable[..., Tensor]] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.transpose.int: swapped,
    aten.t.default: swapped,
    aten.permute.default: permuted,
    aten.view.default: reshaped,
    aten._reshape_alias.default: reshaped,
    aten.unsqueeze.default: reshaped,
    aten.squeeze.default: reshaped,
    aten.squeeze.dim: reshaped,
    aten.squeeze.dims: reshaped,
    aten.view_as_real.default: lambda base, new: torch.view_as_complex(new),
    aten.view_as_complex.default: lambda base, new: torch.view_as_real(new),
}
