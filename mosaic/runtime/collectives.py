"""Moving a sharded axis between the ranks: each function is the adjoint of another one.

| forward                             | backward                |
|-------------------------------------|-------------------------|
| ``enter`` whole -> sharded work     | ``sum_across``          |
| ``sum_across`` partial -> whole     | ``enter`` (an identity) |
| ``slice_to`` whole -> my intervals  | ``gather``              |
| ``gather`` sharded -> whole         | ``slice_to``            |
| ``reshard`` source -> target        | target -> source        |
| ``halo`` -> overlapping intervals   | ``halo_sum``            |

The gradient of a whole tensor is whole. (torch's own autograd for functional collectives answers
another question, every rank's loss being a share, and would multiply by p.)

``gather``, ``reshard``, ``halo`` and ``reduce_across`` are registered ops, opaque until the
lowering: a collective that AOTAutograd's partitioner can see is always saved for backward. What
they do is one plain function each in ``mosaic/runtime/comm.py``, which the op runs and the lowering
traces. ``number`` means nothing to them: ``passes/pin_collectives.py`` says what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mosaic.layout import Shard
from mosaic.runtime import comm
from mosaic.runtime.comm import fresh, gather_program, local_slice, reshard_program, spread

_decode = lru_cache(maxsize=4096)(Shard.decode)


# --- the registered ops -----------------------------------------------------------------------


@torch.library.custom_op(
    "mosaic::gather", mutates_args=(), schema="(Tensor x, str spec, *, int number=0) -> Tensor"
)
def gather(x: Tensor, spec: str, *, number: int = 0) -> Tensor:
    """Sharded -> whole."""
    return fresh([gather_program(x, _decode(spec))], [x])[0]


@gather.register_fake
def _(x: Tensor, spec: str, *, number: int = 0) -> Tensor:
    place = _decode(spec).place
    return x.new_empty([place.size if d == place.dim else size for d, size in enumerate(x.shape)])


def _gather_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.spec = inputs[1]


gather.register_autograd(
    lambda ctx, grad: (slice_to(grad, ctx.spec), None), setup_context=_gather_context
)


@torch.library.custom_op(
    "mosaic::reshard",
    mutates_args=(),
    schema="(Tensor x, str source, str target, *, int number=0) -> Tensor",
)
def reshard(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    """One partition of an axis to another."""
    return fresh([reshard_program(x, _decode(source), _decode(target))], [x])[0]


@reshard.register_fake
def _(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    shard = _decode(target)
    return x.new_empty(shard.place.local_shape(x.shape, shard.rank))


def _reshard_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.source, ctx.target = inputs[1:]


reshard.register_autograd(
    lambda ctx, grad: (torch.ops.mosaic.reshard(grad, ctx.target, ctx.source), None, None),
    setup_context=_reshard_context,
)


_HALO = "(Tensor x, str source, str target, *, int number=0) -> Tensor"


@torch.library.custom_op("mosaic::halo", mutates_args=(), schema=_HALO)
def halo(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    """A partition of an axis to a layout that overlaps."""
    return fresh([comm.halo_program(x, _decode(source), _decode(target))], [x])[0]


@torch.library.custom_op("mosaic::halo_sum", mutates_args=(), schema=_HALO)
def halo_sum(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    """What is at the target of a halo goes back to its source, and is added there."""
    return fresh([comm.halo_sum_program(x, _decode(source), _decode(target))], [x])[0]


@halo.register_fake
def _(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    shard = _decode(target)
    return x.new_empty(shard.place.local_shape(x.shape, shard.rank))


@halo_sum.register_fake
def _(x: Tensor, source: str, target: str, *, number: int = 0) -> Tensor:
    shard = _decode(source)
    return x.new_empty(shard.place.local_shape(x.shape, shard.rank))


halo.register_autograd(
    lambda ctx, grad: (torch.ops.mosaic.halo_sum(grad, ctx.source, ctx.target), None, None),
    setup_context=_reshard_context,
)
halo_sum.register_autograd(
    lambda ctx, grad: (torch.ops.mosaic.halo(grad, ctx.source, ctx.target), None, None),
    setup_context=_reshard_context,
)


@torch.library.custom_op(
    "mosaic::reduce_across",
    mutates_args=(),
    schema="(Tensor x, str group, str op, *, int number=0) -> Tensor",
)
def reduce_across(x: Tensor, group: str, op: str, *, number: int = 0) -> Tensor:
    """The ranks' partial results -> their sum, max or min. ``sum_across`` is its differentiable
    form."""
    return fresh([comm.reduced(x, group, op)], [x])[0]


@reduce_across.register_fake
def _(x: Tensor, group: str, op: str, *, number: int = 0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- the traced-through functions ---------------------------------------------------------------


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_across(grad, ctx.group), None


class _SumAcross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return torch.ops.mosaic.reduce_across(x, group, "sum")

    @staticmethod
    def backward(ctx, grad: Tensor):
        return enter(grad, ctx.group), None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, spec: str) -> Tensor:
        ctx.spec = spec
        return local_slice(x, _decode(spec))

    @staticmethod
    def backward(ctx, grad: Tensor):
        shard = _decode(ctx.spec)
        if shard.place.layout.is_partition:
            return torch.ops.mosaic.gather(grad, ctx.spec), None
        return sum_across(spread(grad, shard), shard.group), None


@torch.compiler.allow_in_graph
def enter(x: Tensor, group: str) -> Tensor:
    """A whole tensor goes into sharded work: the identity; the ranks' gradients are summed."""
    return _Enter.apply(x, group) if group else x


class _EnterTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: str, *xs: Tensor):
        ctx.group = group
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = sum_across(torch.cat([grad.reshape(-1) for grad in grads]), ctx.group)
        parts = total.split([grad.numel() for grad in grads])
        return None, *(p.view_as(g).to(g.dtype) for p, g in zip(parts, grads, strict=True))


def enter_together(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    """``enter`` for several tensors, with one all-reduce for their gradients."""
    wanted = [x for x in xs if x.requires_grad]
    if not wanted or not group:
        return list(xs)
    entered = iter(_EnterTogether.apply(group, *wanted))
    return [next(entered) if x.requires_grad else x for x in xs]


@torch.compiler.allow_in_graph
def sum_across(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """A partial result becomes whole. ``max`` and ``min`` have no gradient here: their caller
    sends it to one winner."""
    if not group:
        return x
    if op == "sum":
        return _SumAcross.apply(x, group)
    return torch.ops.mosaic.reduce_across(x.detach(), group, op)


@torch.compiler.allow_in_graph
def slice_to(x: Tensor, spec: str) -> Tensor:
    """My intervals of a whole tensor. They may overlap the other ranks', or leave indices out."""
    return _Slice.apply(x, spec)


# --- gradients that stay shares (an outer reducer sums them) ------------------------------------


class _SliceShare(_Slice):
    @staticmethod
    def backward(ctx, grad: Tensor):
        return spread(grad, _decode(ctx.spec)), None


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: int) -> Tensor:
        ctx.p = p
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.p, None


def slice_share(x: Tensor, spec: str) -> Tensor:
    """``slice_to`` whose gradient is zero outside my intervals instead of gathered."""
    return _SliceShare.apply(x, spec)


def divide_gradient(x: Tensor, p: int) -> Tensor:
    """A whole tensor in whole work: every rank has the whole gradient, and its share is a p-th."""
    return _DivideGradient.apply(x, p)
