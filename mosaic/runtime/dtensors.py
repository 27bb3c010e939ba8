"""DTensors in a program: three moves between what one rank of a mesh axis has and the whole tensor.

    h = DTensor.from_local(x, mesh, [Shard(2)])     ->  mosaic::from_rank(x, 2, "tp", 2)
    h = h.redistribute(placements=[Replicate()])    ->  mosaic::redistribute(h, -1, "tp", 2)
    y = h.to_local()                                ->  mosaic::to_rank(h, -1, "", "tp", 2)

Between ``from_rank`` and ``to_rank`` the program is that of one device, at global sizes; elsewhere
it is that of one rank. ``passes/localize_dtensors.py`` makes it one rank's everywhere, and then
these ops are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: In place of a dim: all of it is on every rank, and every rank has a part of a sum.
REPLICATED, PARTIAL = -1, -2


@torch.library.custom_op("mosaic::from_rank", mutates_args=())
def from_rank(x: Tensor, dim: int, mesh_axis: str, p: int) -> Tensor:
    """A rank's tensor is its part along ``dim`` of the result."""
    raise AssertionError("mosaic::from_rank stands for DTensor.from_local and is never run")


@from_rank.register_fake
def _(x: Tensor, dim: int, mesh_axis: str, p: int) -> Tensor:
    return x.new_empty([n * p if d == dim else n for d, n in enumerate(x.shape)])


@torch.library.custom_op("mosaic::redistribute", mutates_args=())
def redistribute(x: Tensor, dim: int, mesh_axis: str, p: int) -> Tensor:
    """The same tensor, cut along ``dim`` from here on."""
    raise AssertionError("mosaic::redistribute stands for a DTensor's and is never run")


@redistribute.register_fake
def _(x: Tensor, dim: int, mesh_axis: str, p: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mosaic::to_rank", mutates_args=())
def to_rank(x: Tensor, dim: int, gradient: str, mesh_axis: str, p: int) -> Tensor:
    """This rank's part along ``dim`` of a tensor. ``gradient``: how the ranks' gradients of a
    replicated one meet ("sum" or "avg"); "" if they are equal."""
    raise AssertionError("mosaic::to_rank stands for DTensor.to_local and is never run")


@to_rank.register_fake
def _(x: Tensor, dim: int, gradient: str, mesh_axis: str, p: int) -> Tensor:
    return x.new_empty([n // p if d == dim else n for d, n in enumerate(x.shape)])


@torch.library.custom_op("mosaic::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    """The same tensor, plain while Dynamo traces: DTensors are made of no ShardedTensors."""
    raise AssertionError("mosaic::plain stands for its operand and is never run")


@plain.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
