"""A tensor of the single-device program of which every rank holds a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.collectives import slice_to
from mosaic.runtime.many_lengths import Bucketed, ManyLengths
from mosaic.runtime.memory import Memory
from mosaic.runtime.mesh import get_context
from mosaic.torch_private import (
    FakeTensor,
    is_traceable_wrapper_subclass,
    pytree,
    views_by_their_ops,
    without_torch_function,
)

#: What runs an op, and an attention, of which an operand is a ShardedTensor:
#: ``frontend/eagerly.py`` puts itself here, as it knows the rules.
RUN: dict[str, Callable[..., Any]] = {}


ATTENTION = F.scaled_dot_product_attention
#: What leaves PyTorch has the whole: all ranks must do it, as with ``full_tensor``.
READS = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__reduce_ex__,
}
Fn = TypeVar("Fn", bound=Callable[..., Any])


def uncompiled(fn: Fn) -> Fn:
    """``fn`` as it is, where Dynamo runs a function frame by frame; in one that it compiles, a
    break of the graph."""
    disabled: Fn = torch.compiler.disable(fn, reason="it works on parts, outside of a graph")
    return disabled


@contextmanager
def caught_attention() -> Iterator[None]:
    """Inside of torch's own functions a subclass is not asked about the calls that they make."""
    F.scaled_dot_product_attention = RUN["attention"]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ATTENTION


#: These are asked about the very tensors that they are given.
OF_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


class ShardedTensor(ManyLengths):
    """Its shape and strides are the global ones: those that it has on one device. This rank holds a
    part along each of ``places``, one for each mesh axis that cuts it, in the order of the mesh:
    each cuts what those before it leave.

    ``mosaic.distribute`` cuts a whole tensor, ``ShardedTensor.from_local`` says what parts are of.
    Every op of torch takes it and gives what it gives on one device, gradients too: cut where a
    rule of Mosaic's table allows it, else whole (which is said once for each line). All ranks of
    the mesh must run the same ops. In-place ops write into this rank's part, and what is written to
    a view is seen in what it is a view of.
    """

    places: tuple[Place, ...]
    memory: Memory

    @staticmethod
    def __new__(
        cls,
        local: Tensor | Memory,
        shape: Sequence[int],
        places: tuple[Place, ...],
        stride: Sequence[int] | None = None,
    ) -> ShardedTensor:
        memory = local if isinstance(local, Memory) else Memory(local)
        x: ShardedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            torch.Size(shape),
            strides=stride,
            dtype=memory.part.dtype,
            device=memory.part.device,
        )
        x.memory, x.places = memory, places
        return x

    @property
    def _local(self) -> Tensor:
        """This rank's part; not differentiable."""
        return self.memory.current()

    def bare(self) -> ShardedTensor:
        """The same tensor, in the same memory, without a history."""
        return self.viewed(self.memory, self.shape, self.places, self.stride())

    def viewed(self, memory: Memory, *sizes: Any) -> ShardedTensor:
        """A view, which in inference mode is a tensor for inference only if this is one."""
        if torch.is_inference_mode_enabled() and not self.is_inference():
            with torch.inference_mode(False):
                return ShardedTensor(memory, *sizes)
        return ShardedTensor(memory, *sizes)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Place, ...] | Bucketed]:
        if self.bucket is not None:
            return ["_nothing"], Bucketed(self.bucket)
        return ["_local"], self.places

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], known: tuple[Place, ...] | Bucketed, shape: Any, stride: Any
    ) -> ShardedTensor:
        (part,) = inner.values()
        places = known.places if isinstance(known, Bucketed) else known
        x = ShardedTensor(part, shape, places, stride)
        if isinstance(known, Bucketed):
            x.bucket, x._nothing = places, part
        return x

    def __repr__(self) -> str:  # type: ignore[override]
        cuts = "; ".join(
            f"dim {place.dim} over '{place.mesh_axis}' as {place.layout}" for place in self.places
        )
        return f"ShardedTensor(shape={list(self.shape)}, {cuts}, local={self._local})"

    @classmethod
    @uncompiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return RUN["op"](func, args, kwargs or {})

    @classmethod
    @uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return func(args[0].detach().full_tensor(), *args[1:], **(kwargs or {}))
        traced = is_traced(args, kwargs or {})
        if func is ATTENTION and not traced:  # which torch would take apart
            return RUN["attention"](*args, **(kwargs or {}))
        if not traced and torch.is_grad_enabled() and func not in OF_AUTOGRAD:
            args, kwargs = with_whole_gradients(func, args, kwargs or {})
        calls_it = func is F.multi_head_attention_forward and not traced
        caught = caught_attention() if calls_it else nullcontext()
        with caught, views_by_their_ops(), without_torch_function():
            return func(*args, **(kwargs or {}))

    @staticmethod
    @uncompiled
    def from_local(part: Tensor, dim: int, layout: Layout, mesh: str = "sp") -> ShardedTensor:
        """The tensor of which ``part`` is what this rank holds, by ``layout``; differentiable, and
        the gradient of ``part`` is a part.

        Raises ShardingError where the part is not as long as the layout says.
        """
        context = get_context()
        rank, p = context.rank(mesh), context.size(mesh)
        dim = dim_of(part, dim)
        fits = checked_layout(layout).p == p and layout.lengths[rank] == part.shape[dim]
        if not fits or not layout.is_partition:
            raise ShardingError(
                f"the part is not what the layout says of dim {dim}",
                sizes=f"{list(part.shape)} on rank {rank} of {p}",
                layout=layout,
            )
        shape = [layout.n if d == dim else size for d, size in enumerate(part.shape)]
        return wrapped(part, shape, (Place(layout, dim, mesh_axis=mesh),))

    @property
    @uncompiled
    def local(self) -> Tensor:
        """This rank's part. Differentiable: its gradient is this rank's part of the whole one."""
        return _Local.apply(self)

    @property
    def layout_along(self) -> dict[int, Layout]:
        """Which indices each rank holds, for each dim that is cut. (``x.layout`` is torch's: that
        of memory.)"""
        return {place.dim: place.layout for place in self.places}

    @uncompiled
    def full_tensor(self) -> Tensor:
        """The whole on every rank, in global order; differentiable. All ranks must call it."""
        if self.places:
            RUN["meet"](",".join(place.mesh_axis for place in self.places), "full_tensor")
        return _Full.apply(self)


@uncompiled
def distribute(
    x: Tensor, dim: int, layout: Layout | None = None, mesh: str = "sp"
) -> ShardedTensor:
    """Cut a whole tensor, which every rank has, along ``dim``: as ``torch.chunk`` does, or by
    ``layout``. Differentiable: the gradient of ``x`` is whole.

    Raises ShardingError for a dim that is not there, and a layout of another length or number of
    ranks.
    """
    context = get_context()
    dim, p = dim_of(x, dim), context.size(mesh)
    layout = layout_for(x, dim, layout, p)
    place = Place(layout, dim, mesh_axis=mesh)
    if not isinstance(x, ShardedTensor):
        return _Distribute.apply(x, (place,))
    if mesh in [held.mesh_axis for held in x.places] or dim in x.layout_along:
        raise ShardingError(
            "the tensor is cut there, or over that mesh axis, already",
            cut=repr(x).rpartition(", local=")[0],
            fix="cut another dim over another mesh axis, or start from x.full_tensor()",
        )
    places = sorted((*x.places, place), key=lambda held: context.position(held.mesh_axis))
    part = sliced(x.local, (place,))
    return wrapped(part, x.shape, tuple(places))


def layout_for(
    x: Tensor, dim: int, layout: Layout | None, p: int, may_be_whole: bool = False
) -> Layout:
    """How a whole tensor is cut in ``dim`` over p ranks; if nothing is said as by ``torch.chunk``.

    Raises ShardingError for a layout of another length or number of ranks, and for one that is no
    cut (all of it on every rank, if that may be).
    """
    if layout is None:
        return Layout.even(x.shape[dim], p)
    if (checked_layout(layout).n, layout.p) != (x.shape[dim], p):
        raise ShardingError(
            f"the layout does not fit dim {dim}",
            sizes=f"the tensor has {x.shape[dim]} there and the mesh axis {p} ranks; "
            f"the layout is of {layout.n} over {layout.p}",
            fix="make it for these sizes: mosaic.Layout.even(length, ranks)",
        )
    is_whole = may_be_whole and layout == Layout.whole(layout.n, p)
    if not layout.is_partition and not is_whole:
        raise ShardingError(
            "the layout holds an index twice, or leaves one out",
            layout=layout,
            fix="give every index to one rank, or all of them to every rank (Layout.whole)"
            if may_be_whole
            else "give every index to one rank",
        )
    return layout


def checked_layout(layout: Layout) -> Layout:
    """Raises ShardingError for what is none."""
    if not isinstance(layout, Layout):
        raise ShardingError(
            f"layout = {layout!r} is no layout",
            fix="make one: mosaic.Layout.even(n, p), Layout.zigzag(n, p), Layout.of(n, ranks)",
        )
    return layout


def is_traced(*arguments: Any) -> bool:
    """Whether a tensor of ours among them is one of Dynamo's, with sizes alone."""
    ours = (x for x in pytree.tree_leaves(arguments) if is_traceable_wrapper_subclass(x))
    inner = [getattr(x, name) for x in ours for name in x.__tensor_flatten__()[0]]
    return any(isinstance(x, FakeTensor) for x in inner) or (bool(inner) and is_traced(inner))


def dim_of(x: Tensor, dim: int) -> int:
    """A dim from the front. Raises ShardingError for one that x lacks."""
    if not isinstance(x, Tensor):
        raise ShardingError(f"a {type(x).__name__} is no tensor", fix="pass a torch.Tensor")
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ShardingError(
            f"there is no dim {dim!r} in the tensor",
            sizes=list(x.shape),
            fix=f"use one of its {x.ndim} dims, from 0 or from -1",
        )
    return dim % x.ndim


def wrapped(
    part: Tensor,
    shape: Sequence[int],
    places: tuple[Place, ...],
    stride: Sequence[int] | None = None,
) -> ShardedTensor:
    """``part`` as a tensor of the whole program; differentiable."""
    return _Wrap.apply(part, tuple(shape), places, stride)


def with_whole_gradients(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A call's arguments; what it writes to as it is."""
    name = getattr(func, "__name__", "")
    writes = name.startswith("__i") or name == "__setitem__" or name.rstrip("_") + "_" == name
    first, rest = (args[:1], args[1:]) if writes else ((), args)
    out = {"out": kwargs.pop("out")} if "out" in kwargs else {}
    rest, kwargs = pytree.tree_map(with_whole_gradient, (tuple(rest), kwargs))
    return (*first, *rest), {**kwargs, **out}


def with_whole_gradient(x: Any) -> Any:
    """A plain tensor that is used beside ShardedTensors: its gradient is a plain one, too."""
    is_plain = isinstance(x, Tensor) and not isinstance(x, ShardedTensor) and x.requires_grad
    return _WholeGradient.apply(x) if is_plain else x


def shard_on(place: Place) -> str:
    """This rank's side of a place, as collectives take it."""
    context = get_context()
    axis = place.mesh_axis
    return Shard(place, context.rank(axis), context.group_name(axis)).encode()


def sliced(x: Tensor, places: tuple[Place, ...]) -> Tensor:
    """This rank's part of a whole tensor."""
    for place in places:
        x = slice_to(x, shard_on(place))
    return x


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor that may be cut; not differentiable."""
    if not isinstance(x, ShardedTensor):
        return x
    found = x._local
    for place in reversed(x.places):  # the last one cut the parts of those before it
        found = torch.ops.mosaic.gather(found, shard_on(place))
    return found


def part_of(x: Tensor, places: tuple[Place, ...]) -> Tensor:
    """This rank's part at some places of a tensor that may be cut elsewhere."""
    if isinstance(x, ShardedTensor) and x.places == places:
        return x._local
    return sliced(whole(x), places)


class _Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, shape, places, stride):
        ctx.places = places
        return ShardedTensor(part.detach(), shape, places, stride)

    @staticmethod
    def backward(ctx, grad):
        return part_of(grad, ctx.places), None, None, None


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.like = x.shape, x.places
        return x._local.detach()

    @staticmethod
    def backward(ctx, grad):
        return ShardedTensor(grad.contiguous(), *ctx.like)


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, places):
        part = sliced(x.detach(), places).clone(memory_format=torch.contiguous_format)
        return ShardedTensor(part, x.shape, places)

    @staticmethod
    def backward(ctx, grad):
        return whole(grad), None


class _WholeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return whole(grad)


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.like = x.shape, x.places
        return whole(x)

    @staticmethod
    def backward(ctx, grad):
        shape, places = ctx.like
        return ShardedTensor(part_of(grad, places), shape, places)
