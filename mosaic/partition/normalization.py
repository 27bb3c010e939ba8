"""Normalisations and softmax. Over the axis itself they become sums that meet across ranks."""

from __future__ import annotations

from typing import Any

import torch

from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.reductions import cast, extreme_value, summed
from mosaic.partition.values import Call, Value

aten = torch.ops.aten


def layer_norm(s: ShardingInterpreter, c: Call) -> Value:
    """layer_norm and rms_norm: every dim but the normalised ones is free; over the axis itself the
    moments meet across ranks."""
    x = c["input"]
    if x.place is None:
        return s.gather_for(c, "normalises over the axis")
    if x.cut.dim < x.ndim - len(c["normalized_shape"]):
        return s.emit(c, x.place, **others_whole(s, c))
    return normalised(s, c, x, list(range(x.ndim - len(c["normalized_shape"]), x.ndim)))


def normalised(s: ShardingInterpreter, c: Call, x: Value, dims: list[int]) -> Value:
    """Over dims with the axis among them, in float32 at least."""
    eps = torch.finfo(x.val.dtype).eps if c["eps"] is None else c["eps"]
    if x.val.dtype.itemsize == 2:
        x = s.call(c, aten._to_copy.default, x, dtype=torch.float32)
    if "rms" in c.name:
        square = s.call(c, aten.mean.dim, s.call(c, aten.mul.Tensor, x, x), dims, True)
    else:
        square, mean = s.call(c, aten.var_mean.correction, x, dims, correction=0, keepdim=True)
        x = s.call(c, aten.sub.Tensor, x, mean)
    rstd = s.call(c, aten.rsqrt.default, s.call(c, aten.add.Scalar, square, eps))
    out = s.call(c, aten.mul.Tensor, x, rstd)
    if c["weight"] is not None:
        out = s.call(c, aten.mul.Tensor, out, c["weight"])
    if c.bound.get("bias") is not None:
        out = s.call(c, aten.add.Tensor, out, c["bias"])
    return cast(s, c, out)


def others_whole(s: ShardingInterpreter, c: Call) -> dict[str, Any]:
    """Weights, biases and buffers: they may be sharded along a dim of their own."""
    return {
        n: s.gather_aloud(v, "is a weight that all ranks need", c.like)
        for n, v in others(c).items()
    }


def others(c: Call) -> dict[str, Value]:
    return {n: v for n, v in c.bound.items() if isinstance(v, Value) and n != "input"}


def softmax(s: ShardingInterpreter, c: Call) -> Value:
    """Over the axis: the maximum and the sum meet across ranks."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.place)
    e = s.call(c, aten.exp.default, shifted(s, c, x, dim))
    total = summed(s, c, e, [dim], True)
    return cast(s, c, s.call(c, aten.div.Tensor, e, total))


def log_softmax(s: ShardingInterpreter, c: Call) -> Value:
    """Over the axis: the maximum and the sum meet across ranks."""
    x, dim = c.x, c["dim"] % c.x.ndim
    if dim != x.cut.dim:
        return s.emit(c, x.place)
    apart = shifted(s, c, x, dim)
    total = summed(s, c, s.call(c, aten.exp.default, apart), [dim], True)
    return cast(s, c, s.call(c, aten.sub.Tensor, apart, s.call(c, aten.log.default, total)))


def shifted(s: ShardingInterpreter, c: Call, x: Value, dim: int) -> Value:
    if c.val.dtype != x.val.dtype:
        x = s.call(c, aten._to_copy.default, x, dtype=c.val.dtype)
    return s.call(c, aten.sub.Tensor, x, extreme_value(s, c, x, [dim], largest=True))


def batch_norm(s: ShardingInterpreter, c: Call) -> Any:
    """Channels are free. Batch statistics over the axis are global; running buffers stay whole."""
    x = c["input"]
    if x.place is None or (x.cut.dim == 1 and 0 in x.cut.layout.lengths):
        return s.gather_for(c, "has no channels on some rank")
    if x.cut.dim == 1:
        there: dict[str, Any] = {n: s.at(v, x.cut.at(0)) for n, v in others(c).items()}
        return s.emit(c, tuple(x.cut.at(0) if v.ndim == 1 else x.place for v in c.val), **there)
    if c.bound.get("training", "running_mean" not in c.bound):
        return trained(s, c, x)
    # Written out: on the CPU the op's own backward kills the process on an empty shard.
    mean, var = c["running_mean"], c["running_var"]
    rstd = s.call(c, aten.rsqrt.default, s.call(c, aten.add.Tensor, var, c["eps"]))
    return (scaled(s, c, x, mean, rstd), mean, rstd, mean, var)[: len(c.val)]


def trained(s: ShardingInterpreter, c: Call, x: Value) -> tuple[Value, ...]:
    dims = [d for d in range(x.ndim) if d != 1]
    var, mean = s.call(c, aten.var_mean.correction, x, dims, correction=0)
    rstd = s.call(c, aten.rsqrt.default, s.call(c, aten.add.Tensor, var, c["eps"]))
    out = scaled(s, c, x, mean, rstd)
    if c.bound.get("running_mean") is None:
        return out, mean, rstd
    n = x.val.numel() // x.shape[1]
    unbiased = s.call(c, aten.mul.Tensor, var, n / max(n - 1, 1))
    buffers = running(s, c, c["running_mean"], mean), running(s, c, c["running_var"], unbiased)
    return out, mean, rstd, *buffers


def scaled(s: ShardingInterpreter, c: Call, x: Value, mean: Value, rstd: Value) -> Value:
    out = s.call(c, aten.sub.Tensor, x, along(s, c, mean, x.ndim))
    return affine(s, c, s.call(c, aten.mul.Tensor, out, along(s, c, rstd, x.ndim)))


def affine(s: ShardingInterpreter, c: Call, x: Value) -> Value:
    if c["weight"] is not None:
        x = s.call(c, aten.mul.Tensor, x, along(s, c, c["weight"], x.ndim))
    return x if c["bias"] is None else s.call(c, aten.add.Tensor, x, along(s, c, c["bias"], x.ndim))


def group_norm(s: ShardingInterpreter, c: Call) -> Value:
    """Batches are free; over the axis itself each group's moments meet across ranks."""
    x = c["input"]
    if x.place is None or x.cut.dim == 1:
        return s.gather_for(c, "cuts its groups")
    if x.cut.dim == 0:
        return s.emit(c, x.place, **others_whole(s, c))
    flat = s.call(c, aten.reshape.default, x, [x.shape[0], c["num_groups"], -1])
    var, mean = s.call(c, aten.var_mean.correction, flat, [2], correction=0, keepdim=True)
    rstd = s.call(c, aten.rsqrt.default, s.call(c, aten.add.Tensor, var, c["eps"]))
    out = s.call(c, aten.mul.Tensor, s.call(c, aten.sub.Tensor, flat, mean), rstd)
    return affine(s, c, s.call(c, aten.reshape.default, out, list(x.shape)))


def along(s: ShardingInterpreter, c: Call, stat: Value, ndim: int) -> Value:
    return s.call(c, aten.view.default, stat, [1, -1, *[1] * (ndim - 2)])


def running(s: ShardingInterpreter, c: Call, old: Value, new: Value) -> Value:
    kept = s.call(c, aten.mul.Tensor, old, 1 - c["momentum"])
    new = s.call(c, aten.detach.default, new)
    return s.call(c, aten.add.Tensor, kept, s.call(c, aten.mul.Tensor, new, c["momentum"]))
