"""Shards in eager code: what ``outputs="shards"`` gives, and how to go on with it.

Every function is differentiable and the adjoint of another: a whole tensor's gradient is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.collectives import slice_to
from mosaic.errors import ShardingError
from mosaic.layout import Layout, Place, Shard
from mosaic.mesh import get_context
from mosaic.torch_private import may_vary

_MARK = "_mosaic_shard"


def mark(x: Tensor, spec: str) -> Tensor:
    """Remember on the tensor how it is cut."""
    setattr(x, _MARK, spec)
    return x


def shard_of(x: Tensor) -> Shard:
    """How a tensor is cut. Raises ShardingError for one that Mosaic did not cut."""
    spec = getattr(x, _MARK, None)
    if spec is None:
        raise ShardingError(
            "this tensor carries no layout",
            sizes=list(x.shape),
            fix="pass an output of a model compiled with outputs='shards', "
            "or of mosaic.shard_tensor; what is computed from one is a plain tensor: "
            "use mosaic.shard_like(whole, that output)",
        )
    return Shard.decode(spec)


def layout_of(x: Tensor) -> Layout:
    """Which global indices each rank holds."""
    return shard_of(x).place.layout


def gather(x: Tensor) -> Tensor:
    """The whole tensor on every rank, in global order."""
    return torch.ops.mosaic.gather(x, shard_of(x).encode())


def shard_tensor(
    x: Tensor, dim: int, *, layout: Layout | None = None, mesh_axis: str = "sp"
) -> Tensor:
    """This rank's part of a whole tensor along ``dim``: cut as ``torch.chunk`` or by ``layout``.

    Raises ShardingError when the layout is for another length or another number of ranks.
    """
    context = get_context()
    dim, p = dim % x.ndim, context.size(mesh_axis)
    layout = layout or Layout.even(x.shape[dim], p)
    if (layout.n, layout.p) != (x.shape[dim], p):
        raise ShardingError(
            f"the layout does not fit dim {dim}",
            sizes=f"the tensor has {x.shape[dim]} there and the mesh axis {p} ranks; "
            f"the layout is of {layout.n} over {layout.p}",
        )
    place = Place(layout, dim, mesh_axis=mesh_axis)
    shard = Shard(place, context.rank(mesh_axis), context.group_name(mesh_axis))
    # A tensor of its own: a view would keep the whole one in memory, and differ between ranks.
    part = slice_to(x, shard.encode()).clone(memory_format=torch.contiguous_format)
    # A compiled program that takes it (inputs_are="shards") is traced again at the global length.
    may_vary(part, dim)
    return mark(part, shard.encode())


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor (labels), cut as ``like`` is along the same dim."""
    shard = shard_of(like)
    place = shard.place
    if x.ndim <= place.dim or x.shape[place.dim] != place.size:
        raise ShardingError(
            "the tensor does not have the axis where the other has it",
            sizes=f"{list(x.shape)} against length {place.size} in dim {place.dim}",
        )
    return mark(slice_to(x, shard.encode()), shard.encode())
