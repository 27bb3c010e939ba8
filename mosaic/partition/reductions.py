"""Reductions: a dim that is not reduced is free; over the axis, parts meet in an all-reduce."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from mosaic.layout import Layout, Place
from mosaic.partition import empty
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


def reduced_dims(c: Call, name: str = "dim") -> list[int]:
    dims, ndim = c.bound.get(name), c.x.ndim
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def kept(place: Place, dims: list[int], keepdim: bool) -> Place:
    """Where the axis is after other dims were reduced."""
    return place if keepdim else place.at(place.dim - sum(d < place.dim for d in dims))


def free(s: ShardingInterpreter, c: Call, dims: list[int]) -> Any:
    return s.emit(c, kept(c.x.cut, dims, bool(c.bound.get("keepdim"))))


def along(s: ShardingInterpreter, c: Call, name: str) -> Any:
    """Works along one dim: every other dim is free."""
    x = c.x
    dim = c.bound.get(name)
    if dim is None or dim % x.ndim == x.cut.dim:
        return s.gather_for(c, "works along the axis")
    gone = first(c.val).ndim < x.ndim
    return s.emit(c, kept(x.cut, [dim % x.ndim], not gone))


def first(val: Any) -> torch.Tensor:
    return val[0] if isinstance(val, (tuple, list)) else val


def transform(s: ShardingInterpreter, c: Call) -> Any:
    """Works along some dims (fft): every other dim is free, and stays where it is."""
    x = c.x
    if x.cut.dim in reduced_dims(c):
        return s.gather_for(c, "works along the axis")
    return empty.emit(s, c, x.cut)


def quantile(s: ShardingInterpreter, c: Call) -> Value:
    """Every other dim is free; several quantiles are a new first dim."""
    x, q = c.x, c["q"]
    if c["dim"] is None or x.place is None or x.cut.dim == c["dim"] % x.ndim:
        return s.gather_for(c, "works along the axis")
    several = int(isinstance(q, Value) and q.ndim == 1)
    new: dict[str, Any] = {}
    if isinstance(q, Value):
        new["q"] = s.gather(q, "quantiles that all ranks need")
    place = kept(x.place, [c["dim"] % x.ndim], c["keepdim"])
    return empty.emit(s, c, place.at(place.dim + several), **new)


def norm(s: ShardingInterpreter, c: Call) -> Value:
    """Over the axis: the norm of all ranks' norms."""
    x, dims = c.x, reduced_dims(c)
    if x.cut.dim not in dims:
        return free(s, c, dims)
    order = c.bound.get("ord", c.bound.get("p"))
    order = 2 if order is None else order
    if order in (float("inf"), -float("inf")):
        return cast(s, c, extreme_size(s, c, dims, order > 0))
    if order < 1:
        return s.gather_for(c, "works along the axis")
    dtype = torch.float32 if c.val.dtype.itemsize == 2 else c.val.dtype
    part = Call(aten.linalg_vector_norm.default, (x, order, dims, bool(c.bound.get("keepdim"))),
                {"dtype": dtype}, None, c.like)  # fmt: skip
    every = each_rank(s, part, "the norms of all parts")
    return cast(s, c, s.call(c, aten.linalg_vector_norm.default, every, order, [0], False))


def extreme_size(s: ShardingInterpreter, c: Call, dims: list[int], largest: bool) -> Value:
    """The largest or smallest absolute value. A nan is the result, as of any maximum, and takes all
    of the gradient; that of a maximum would be nan everywhere."""
    keepdim = bool(c["keepdim"])
    size = s.call(c, aten.abs.default, c.x)
    missing = s.call(c, aten.isnan.default, size)
    never = 0.0 if largest else float("inf")
    known = s.call(c, aten.where.ScalarSelf, missing, never, size)
    found = s.call(c, aten.amax.default if largest else aten.amin.default, known, dims, keepdim)
    is_missing = s.call(c, aten.any.dims, missing, dims, keepdim)
    return s.call(c, aten.where.ScalarSelf, is_missing, float("nan"), found)


def each_rank(s: ShardingInterpreter, part: Call, why: str) -> Value:
    """The results of a reduction on every rank, as a new first dim, whole."""
    part.val = s.global_value(part)
    mine = s.emit(part, None)
    mine = s.call(part, aten.unsqueeze.default, mine, 0)
    p = s.axis.p
    place = Place(Layout.even(p, p), 0, mesh_axis=s.axis.mesh_axis)
    return s.gather(Value(mine.val.expand(p, *part.val.shape), place, mine.node), why, part.like)


def product(s: ShardingInterpreter, c: Call) -> Value:
    """The product of all ranks' products."""
    x, dim = c.x, c.bound.get("dim")
    if dim is not None and x.cut.dim != dim % x.ndim:
        return along(s, c, "dim")
    every = each_rank(s, c.replaced({}), "the products of all parts")
    return s.call(c, aten.prod.dim_int, every, 0, False, dtype=c["dtype"])


def nansum(s: ShardingInterpreter, c: Call) -> Value:
    """A sum in which a nan is zero."""
    dims = reduced_dims(c)
    x = without_nan(s, c)
    return s.call(c, aten.sum.dim_IntList, x, dims, c["keepdim"], dtype=c["dtype"])


def nanmean(s: ShardingInterpreter, c: Call) -> Value:
    """The sum by the number of what is no nan."""
    dims, keepdim = reduced_dims(c), c["keepdim"]
    there = s.call(c, aten.logical_not.default, s.call(c, aten.isnan.default, c.x))
    number = s.call(c, aten.sum.dim_IntList, there, dims, keepdim)
    out = summed(s, c, without_nan(s, c), dims, keepdim, c["dtype"])
    return cast(s, c, s.call(c, aten.div.Tensor, out, number))


def without_nan(s: ShardingInterpreter, c: Call) -> Value:
    missing = s.call(c, aten.isnan.default, c.x)
    return s.call(c, aten.where.ScalarSelf, missing, 0, c.x)


def cosine_similarity(s: ShardingInterpreter, c: Call) -> Value:
    """The product of both, each by its norm; where that is below eps its gradient is as if it
    were not, as on one device."""
    shape = torch.broadcast_shapes(c["x1"].shape, c["x2"].shape)
    dim, sides = c["dim"] % len(shape), []
    for x in (c["x1"], c["x2"]):
        x = x if x.shape == shape else s.call(c, aten.expand.default, x, list(shape))
        size = s.call(c, aten.linalg_vector_norm.default, x, 2, [dim], True)
        bare = s.call(c, aten.detach.default, size)
        lift = s.call(c, aten.sub.Tensor, s.call(c, aten.clamp_min.default, bare, c["eps"]), bare)
        sides.append(s.call(c, aten.div.Tensor, x, s.call(c, aten.add.Tensor, size, lift)))
    return s.call(c, aten.sum.dim_IntList, s.call(c, aten.mul.Tensor, *sides), [dim])


def total(s: ShardingInterpreter, c: Call) -> Value:
    """Partial sums meet in one all-reduce."""
    dims = reduced_dims(c)
    if c.x.cut.dim not in dims:
        return free(s, c, dims)
    return s.sum_across(s.emit(c, None), c, "sum over the axis")


def summed(
    s: ShardingInterpreter, c: Call, x: Value, dims: list[int], keepdim: bool, dtype: Any = None
) -> Value:
    """A sum whose partial results are not rounded to half precision before they meet."""
    wide = torch.float32 if x.val.dtype in HALVES else None
    return s.call(c, aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype or wide)


def mean(s: ShardingInterpreter, c: Call) -> Value:
    """The sum over the axis, by the global count."""
    x, dims = c.x, reduced_dims(c)
    if x.cut.dim not in dims:
        return free(s, c, dims)
    keepdim = bool(c.bound.get("keepdim"))
    out = summed(s, c, x, dims, keepdim, c["dtype"])
    return cast(s, c, s.call(c, aten.div.Tensor, out, count(x, dims)))


def count(x: Value, dims: list[int]) -> int:
    return prod(x.shape[d] for d in dims)


def cast(s: ShardingInterpreter, c: Call, out: Value, like: torch.Tensor | None = None) -> Value:
    """In the dtype of the result (``like``, where there are several)."""
    dtype = (c.val if like is None else like).dtype
    return out if out.val.dtype == dtype else s.call(c, aten._to_copy.default, out, dtype=dtype)


def variance(s: ShardingInterpreter, c: Call) -> tuple[Value, Value]:
    """The variance and the mean in two passes (the mean, then squares about it): sums of squares
    would cancel. All is told from the largest, so that equal numbers have a variance of zero, as on
    one device."""
    x, dims, keepdim = c.x, reduced_dims(c), bool(c.bound.get("keepdim"))
    if x.val.dtype in HALVES:
        x = s.call(c, aten._to_copy.default, x, dtype=torch.float32)
    largest = None
    if not x.val.is_complex() and x.val.numel():
        largest = extreme_value(s, c, x, dims, largest=True)
        x = s.call(c, aten.sub.Tensor, x, largest)
    mean = s.call(c, aten.mean.dim, x, dims, True)
    # The gradients by way of the mean sum to zero: one all-reduce less, and inf stays inf.
    apart = s.call(c, aten.sub.Tensor, x, s.call(c, aten.detach.default, mean))
    if x.val.is_complex():
        apart = s.call(c, aten.abs.default, apart)
    squares = s.call(c, aten.mul.Tensor, apart, apart)
    squares = s.call(c, aten.sum.dim_IntList, squares, dims, keepdim)
    left = max(0, count(x, dims) - correction(c))
    mean = mean if largest is None else s.call(c, aten.add.Tensor, mean, largest)
    mean = mean if keepdim else s.call(c, aten.squeeze.dims, mean, dims)
    # No degrees of freedom give inf, and nan where there is no spread, as on one device.
    return s.call(c, aten.div.Tensor, squares, float(left)), mean


def correction(c: Call) -> float:
    if "correction" in c.bound:
        return 1 if c["correction"] is None else c["correction"]
    return int(c.bound.get("unbiased", True))


def var(s: ShardingInterpreter, c: Call) -> Value:
    """Two passes over the axis: the mean, then squares about it."""
    dims = reduced_dims(c)
    return cast(s, c, variance(s, c)[0]) if c.x.cut.dim in dims else free(s, c, dims)


def var_mean(s: ShardingInterpreter, c: Call) -> tuple[Value, Value]:
    """The variance (or its root) and the mean."""
    dims = reduced_dims(c)
    if c.x.cut.dim not in dims:
        return free(s, c, dims)
    spread, mean = variance(s, c)
    spread = root(s, c, spread) if "std" in c.name else spread
    return cast(s, c, spread, c.val[0]), cast(s, c, mean, c.val[1])


def std(s: ShardingInterpreter, c: Call) -> Value:
    """The root of the variance."""
    dims = reduced_dims(c)
    if c.x.cut.dim not in dims:
        return free(s, c, dims)
    return cast(s, c, root(s, c, variance(s, c)[0]))


def root(s: ShardingInterpreter, c: Call, spread: Value) -> Value:
    """The root of a variance: its gradient is zero where the variance is, as on one device."""
    is_zero = s.call(c, aten.eq.Scalar, spread, 0)
    known = s.call(c, aten.where.ScalarSelf, is_zero, 1.0, spread)
    return s.call(c, aten.where.ScalarSelf, is_zero, 0.0, s.call(c, aten.sqrt.default, known))


def extreme(s: ShardingInterpreter, c: Call) -> Value:
    """amax and amin: gradients go to the winners in equal parts, as on one device."""
    x, dims = c.x, reduced_dims(c)
    if x.cut.dim not in dims:
        return free(s, c, dims)
    largest = "max" in c.name
    best = extreme_value(s, c, x, dims, largest)
    if not x.val.is_floating_point():
        return reshaped(s, c, best)
    wins = s.call(c, aten.eq.Tensor, x, best)
    if "dim" not in c.bound:  # of max and min a nan may win; of amax and amin nobody then
        wins = s.call(c, aten.logical_or.default, wins, s.call(c, aten.ne.Tensor, x, x))
    number = s.call(c, aten.sum.dim_IntList, wins, dims, True)
    return reshaped(s, c, s.function(c, won, (x, best, wins, number), best.val))


class _Won(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, best, wins, number):
        ctx.save_for_backward(wins, number)
        return best.view_as(best)

    @staticmethod
    def backward(ctx, grad):
        wins, number = ctx.saved_tensors
        return grad * wins / number, None, None, None


def won(x: torch.Tensor, best: torch.Tensor, wins: torch.Tensor, number: torch.Tensor):
    """``best``, whose gradient goes to the ``number`` elements of x (on all ranks) that win."""
    return _Won.apply(x, best, wins, number)


def reshaped(s: ShardingInterpreter, c: Call, x: Value) -> Value:
    return cast(s, c, s.call(c, aten.reshape.default, x, list(c.val.shape)))


def extreme_value(
    s: ShardingInterpreter, c: Call, x: Value, dims: list[int], largest: bool
) -> Value:
    """The maximum (or minimum) over the axis on every rank, dims kept, without a gradient."""
    x = s.call(c, aten.detach.default, x)
    val = torch.amax(x.val, dims, keepdim=True)
    part = s.function(c, local_extreme, (x, dims, largest), val)
    op, word = ("max", "largest") if largest else ("min", "smallest")
    return s.sum_across(part, c, f"{word} over the axis", op)


def local_extreme(x: torch.Tensor, dims: list[int], largest: bool) -> torch.Tensor:
    """amax or amin of a shard that may be empty: then the value that never wins."""
    reduce = torch.amax if largest else torch.amin
    if x.numel():
        return reduce(x, dims, keepdim=True)
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    if x.is_floating_point():
        return x.new_full(shape, -float("inf") if largest else float("inf"))
    if x.dtype == torch.bool:
        return x.new_full(shape, not largest)
    limits = torch.iinfo(x.dtype)
    return x.new_full(shape, limits.min if largest else limits.max)


def any_(s: ShardingInterpreter, c: Call) -> Value:
    """A count of hits meets across ranks."""
    return by_count(s, c, aten.ne.Scalar, aten.gt.Scalar)


def all_(s: ShardingInterpreter, c: Call) -> Value:
    """A count of misses meets across ranks."""
    return by_count(s, c, aten.eq.Scalar, aten.eq.Scalar)


def by_count(s: ShardingInterpreter, c: Call, counted: Any, decided: Any) -> Value:
    """How many elements compare with 0 as ``counted`` says; ``decided`` of that number and 0."""
    dims = reduced_dims(c)
    if c.x.cut.dim not in dims:
        return free(s, c, dims)
    found = s.call(c, counted, c.x, 0)
    number = s.call(c, aten.sum.dim_IntList, found, dims, bool(c.bound.get("keepdim")))
    return cast(s, c, s.call(c, decided, number, 0))


def logsumexp(s: ShardingInterpreter, c: Call) -> Value:
    """The maximum and the sum of exponentials meet across ranks."""
    dims = reduced_dims(c)
    if c.x.cut.dim not in dims:
        return free(s, c, dims)
    if c.x.val.is_complex():
        return s.gather_for(c, "has complex numbers")
    top = extreme_value(s, c, c.x, dims, largest=True)
    finite = s.call(c, aten.lt.Scalar, s.call(c, aten.abs.default, top), float("inf"))
    top = s.call(c, aten.where.ScalarOther, finite, top, 0.0)  # -inf - -inf would be nan
    return reshaped(s, c, s.call(c, aten.add.Tensor, log_total(s, c, c.x, top, dims), top))


def log_total(s: ShardingInterpreter, c: Call, x: Value, top: Value, dims: list[int]) -> Value:
    e = s.call(c, aten.exp.default, s.call(c, aten.sub.Tensor, x, top))
    return s.call(c, aten.log.default, summed(s, c, e, dims, True))
