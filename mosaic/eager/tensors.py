"""Parts as plain tensors, for programs that are written for them: cut, and made whole again.

Both are differentiable, and each the adjoint of the other: a whole tensor's gradient is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.eager.whole import refuse_whole
from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.agreement import check_shards_alike
from mosaic.runtime.collectives import slice_to
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import checked_layout, dim_of, layout_for
from mosaic.runtime.world import own_axes

_MARK = "_mosaic_shard"


def _marked(part: Tensor, x: Tensor, shard: Shard) -> Tensor:
    """``part`` with its layout, beside those over other mesh axes that ``x`` has."""
    had = [Shard.decode(spec) for spec in getattr(x, _MARK, "").split(";") if spec]
    mine = own_axes(shard.place.mesh_axis)
    shards = [*(s for s in had if not mine & own_axes(s.place.mesh_axis)), shard]
    setattr(part, _MARK, ";".join(held.encode() for held in shards))
    return part


def _specs(x: Tensor) -> list[str]:
    if not isinstance(x, Tensor):
        raise ShardingError(f"a {type(x).__name__} is no tensor", fix="pass a torch.Tensor")
    spec = getattr(x, _MARK, None)
    if spec is None:
        raise ShardingError(
            "this tensor carries no layout",
            sizes=list(x.shape),
            fix="say how it is cut: mosaic.gather(x, dim, layout=...); of a ShardedTensor take "
            "x.full_tensor()",
        )
    return spec.split(";")


def layout_text(layout: Layout | None, x: Tensor, dim: int, mesh_axis: str) -> str:
    """The layout of a dim as text: the given one, else what is remembered; "" if nothing is."""
    if layout is not None:
        return str(checked_layout(layout))
    spec = getattr(x, _MARK, None)
    return "" if spec is None else _along(spec, dim % x.ndim, mesh_axis)


@torch.compiler.assume_constant_result
def _along(spec: str, dim: int, mesh_axis: str) -> str:
    places = (Shard.decode(text).place for text in spec.split(";"))
    place = next((p for p in places if p.dim == dim and (p.outer, p.inner) == (1, 1)), None)
    if place is None:
        return ""
    if own_axes(place.mesh_axis) != own_axes(mesh_axis):
        raise ShardingError(
            f"dim {dim} is cut over mesh axis '{place.mesh_axis}', and '{mesh_axis}' is asked for",
            fix=f"use a method with mesh='{place.mesh_axis}', or gather the tensor first",
        )
    return str(place.layout)


def gather(
    x: Tensor, dim: int | None = None, *, layout: Layout | None = None, mesh_axis: str = "sp"
) -> Tensor:
    """The whole tensor on every rank, in global order.

    A tensor that Mosaic cut knows how. Of others say the dim, and the layout unless all ranks have
    equal shards, one behind the other. Raises ShardingError where the shard does not fit.
    """
    if dim is None:
        for spec in reversed(_specs(x)):  # the last axis cut the shards of those before it
            x = torch.ops.mosaic.gather(x, spec)
        return x
    dim = dim_of(x, dim)
    return gather_node(x, dim, layout_text(layout, x, dim, mesh_axis), mesh_axis)


@torch.compiler.allow_in_graph
def gather_node(x: Tensor, dim: int, layout: str, mesh_axis: str) -> Tensor:
    """``gather`` along a dim from the front, with its layout as text."""
    refuse_whole(x, fix="take x.full_tensor()")
    context = get_context()
    n, p, rank = int(x.shape[dim]), context.size(mesh_axis), context.rank(mesh_axis)
    if not layout:
        check_shards_alike(context, mesh_axis, (tuple(map(int, x.shape)),), dim)
    found = Layout.parse(layout) if layout else Layout.even(n * p, p)
    if found.p != p or found.lengths[rank] != n:
        raise ShardingError(
            f"the shard is not the part of dim {dim} that the layout says",
            sizes=f"{list(x.shape)} on rank {rank} of {p}",
            layout=found,
            fix="pass the layout that it was cut with, or leave it out where all shards are equal",
        )
    shard = Shard(Place(found, dim, mesh_axis=mesh_axis), rank, context.group_name(mesh_axis))
    return torch.ops.mosaic.gather(x, shard.encode())


def shard_tensor(
    x: Tensor, dim: int, *, layout: Layout | None = None, mesh_axis: str = "sp"
) -> Tensor:
    """This rank's part of a whole tensor along ``dim``: cut as ``torch.chunk`` or by ``layout``.
    A second call cuts the part along another dim, over another mesh axis.

    Raises ShardingError for a dim that is not there, and when the layout is for another length or
    another number of ranks, or is no cut.
    """
    context = get_context()
    dim, p = dim_of(x, dim), context.size(mesh_axis)
    refuse_whole(x, fix="cut another dim with mosaic.distribute, or start from x.full_tensor()")
    layout = layout_for(x, dim, layout, p, may_be_whole=True)
    place = Place(layout, dim, mesh_axis=mesh_axis)
    shard = Shard(place, context.rank(mesh_axis), context.group_name(mesh_axis))
    # A tensor of its own: a view would keep the whole one in memory, and differ between ranks.
    part = slice_to(x, shard.encode()).clone(memory_format=torch.contiguous_format)
    return _marked(part, x, shard)
