"""Shards in eager code: what ``outputs="shards"`` gives, and how to go on with it.

Every function is differentiable and the adjoint of another: a whole tensor's gradient is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.agreement import check_shards_alike
from mosaic.runtime.collectives import slice_to
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import dim_of
from mosaic.runtime.world import own_axes
from mosaic.torch_private import may_vary

_MARK = "_mosaic_shard"


def mark(x: Tensor, *shards: str) -> Tensor:
    """Remember on the tensor how it is cut: along one axis, or along several in this order."""
    setattr(x, _MARK, ";".join(shards))
    return x


def _marked(part: Tensor, x: Tensor, shard: Shard) -> Tensor:
    """``part`` with its layout, beside those over other mesh axes that ``x`` has. A compiled
    program that takes it (inputs_are="shards") is traced again at the global lengths."""
    had = [Shard.decode(spec) for spec in getattr(x, _MARK, "").split(";") if spec]
    mine = own_axes(shard.place.mesh_axis)
    shards = [*(s for s in had if not mine & own_axes(s.place.mesh_axis)), shard]
    for held in shards:
        may_vary(part, held.place.dim)
    return mark(part, *(held.encode() for held in shards))


def shards_of(x: Tensor) -> list[Shard]:
    """How a tensor is cut. Raises ShardingError for one that Mosaic did not cut."""
    return [Shard.decode(spec) for spec in _specs(x)]


def _specs(x: Tensor) -> list[str]:
    if not isinstance(x, Tensor):
        raise ShardingError(f"a {type(x).__name__} is no tensor", fix="pass a torch.Tensor")
    spec = getattr(x, _MARK, None)
    if spec is None:
        raise ShardingError(
            "this tensor carries no layout",
            sizes=list(x.shape),
            fix="pass an output of a model compiled with outputs='shards', "
            "or of mosaic.shard_tensor; what is computed from one is a plain tensor: "
            "use mosaic.shard_like(whole, that output), or say how it is cut: "
            "mosaic.gather(x, dim, layout=...)",
        )
    return spec.split(";")


def layout_of(x: Tensor, dim: int | None = None) -> Layout:
    """Which global indices each rank holds; ``dim``: of a tensor that is cut in several dims.

    Raises ShardingError for a tensor that Mosaic did not cut, or not in that dim.
    """
    places = [shard.place for shard in shards_of(x)]
    found = [p.layout for p in places if dim is None or p.dim == dim_of(x, dim)]
    if len(found) != 1:
        raise ShardingError(
            "the tensor is cut in several dims" if found else f"dim {dim} of the tensor is whole",
            cut=", ".join(f"dim {p.dim} over mesh axis '{p.mesh_axis}'" for p in places),
            fix="say of which dim: mosaic.layout_of(x, dim)",
        )
    return found[0]


def layout_text(layout: Layout | None, x: Tensor, dim: int, mesh_axis: str) -> str:
    """The layout of a dim as text: the given one, else what is remembered; "" if nothing is."""
    if layout is not None:
        return written(layout)
    spec = getattr(x, _MARK, None)
    return "" if spec is None else _along(spec, dim % x.ndim, mesh_axis)


def written(layout: Layout) -> str:
    """A layout as text. Raises ShardingError for anything else."""
    if not isinstance(layout, Layout):
        raise ShardingError(
            f"layout = {layout!r} is no layout",
            fix="make one: mosaic.Layout.even(n, p), Layout.zigzag(n, p), Layout.of(n, ranks)",
        )
    return str(layout)


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
    layout = Layout.even(x.shape[dim], p) if layout is None else layout
    written(layout)  # says so if it is none
    if (layout.n, layout.p) != (x.shape[dim], p):
        raise ShardingError(
            f"the layout does not fit dim {dim}",
            sizes=f"the tensor has {x.shape[dim]} there and the mesh axis {p} ranks; "
            f"the layout is of {layout.n} over {layout.p}",
            fix="make it for these sizes: mosaic.Layout.even(length, ranks)",
        )
    if not layout.is_partition and layout != Layout.whole(layout.n, p):
        raise ShardingError(
            "the layout holds an index twice, or leaves one out",
            layout=layout,
            fix="give every index to one rank, or all of them to every rank (Layout.whole)",
        )
    place = Place(layout, dim, mesh_axis=mesh_axis)
    shard = Shard(place, context.rank(mesh_axis), context.group_name(mesh_axis))
    # A tensor of its own: a view would keep the whole one in memory, and differ between ranks.
    part = slice_to(x, shard.encode()).clone(memory_format=torch.contiguous_format)
    return _marked(part, x, shard)


def as_shard(part: Tensor, dim: int, *, layout: Layout, mesh_axis: str = "sp") -> Tensor:
    """Say how a part that this rank has made itself (read from its file, computed from a shard) is
    cut along ``dim``. The result shares its memory, and its gradient is the part's.

    >>> rows = mosaic.as_shard(read_my_rows(), 0, layout=mosaic.Layout.even(150_000, 4))

    Raises ShardingError where the part is not as long as the layout says.
    """
    context = get_context()
    dim, p, rank = dim_of(part, dim), context.size(mesh_axis), context.rank(mesh_axis)
    written(layout)  # says so if it is none
    if layout.p != p or layout.lengths[rank] != part.shape[dim] or not layout.is_partition:
        raise ShardingError(
            f"the part is not what the layout says of dim {dim}",
            sizes=f"{list(part.shape)} on rank {rank} of {p}",
            layout=layout,
        )
    shard = Shard(Place(layout, dim, mesh_axis=mesh_axis), rank, context.group_name(mesh_axis))
    out = part.view_as(part)
    return _marked(out, part, shard)


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor (labels), cut as ``like`` is along the same dim."""
    for shard in shards_of(like):
        place = shard.place
        if x.ndim <= place.dim or x.shape[place.dim] != place.size:
            raise ShardingError(
                "the tensor does not have the axis where the other has it",
                sizes=f"{list(x.shape)} against length {place.size} in dim {place.dim}",
                fix="pass a whole tensor that has the same axis in the same dim",
            )
        x = slice_to(x, shard.encode())
    return mark(x, *_specs(like))
