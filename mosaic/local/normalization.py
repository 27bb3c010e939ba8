"""Normalisations and softmax. Over the axis itself they become sums that meet across ranks."""

from __future__ import annotations

from typing import Any

import torch

from mosaic.local.reductions import cast, extreme_value, summed
from mosaic.sharder import Sharder
from mosaic.values import Call, Value

aten = torch.ops.aten


def layer_norm(s: Sharder, c: Call) -> Value:
    """layer_norm and rms_norm: every dim but the normalised ones is free."""
    x = c["input"]
    if x.place is None or x.place.dim >= x.ndim - len(c["normalized_shape"]):
        return s.gather_for(c, "normalises over the axis")
    return s.emit(c, x.place, **others_whole(s, c))


def others_whole(s: Sharder, c: Call) -> dict[str, Value]:
    """Weights, biases and buffers: they may be sharded along a dim of their own."""
    others = {n: v for n, v in c.bound.items() if isinstance(v, Value) and n != "input"}
    return {n: s.gather(v, "a weight that all ranks need", c.like) for n, v in others.items()}


def softmax(s: Sharder, c: Call) -> Value:
    x, dim = c["self"], c["dim"] % c["self"].ndim
    if dim != x.place.dim:
        return s.emit(c, x.place)
    e = s.call(c, aten.exp.default, shifted(s, c, x, dim))
    total = summed(s, c, e, [dim], True)
    return cast(s, c, s.call(c, aten.div.Tensor, e, total))


def log_softmax(s: Sharder, c: Call) -> Value:
    x, dim = c["self"], c["dim"] % c["self"].ndim
    if dim != x.place.dim:
        return s.emit(c, x.place)
    apart = shifted(s, c, x, dim)
    total = summed(s, c, s.call(c, aten.exp.default, apart), [dim], True)
    return cast(s, c, s.call(c, aten.sub.Tensor, apart, s.call(c, aten.log.default, total)))


def shifted(s: Sharder, c: Call, x: Value, dim: int) -> Value:
    if c.val.dtype != x.val.dtype:
        x = s.call(c, aten._to_copy.default, x, dtype=c.val.dtype)
    return s.call(c, aten.sub.Tensor, x, extreme_value(s, c, x, [dim], largest=True))


def batch_norm(s: Sharder, c: Call) -> Any:
    """Batch statistics over the axis are global; the running buffers stay whole."""
    x, training = c["input"], c["training"]
    if x.place is None or x.place.dim == 1:
        return s.gather_for(c, "normalises over the axis")
    if not training:
        return s.emit(c, (x.place, None, None, None, None), **others_whole(s, c))
    dims = [d for d in range(x.ndim) if d != 1]
    mean = s.call(c, aten.mean.dim, x, dims, False)
    var = s.call(c, aten.var.correction, x, dims, correction=0)
    rstd = s.call(c, aten.rsqrt.default, s.call(c, aten.add.Tensor, var, c["eps"]))
    out = s.call(c, aten.sub.Tensor, x, along(s, c, mean, x.ndim))
    out = s.call(c, aten.mul.Tensor, out, along(s, c, rstd, x.ndim))
    if c["weight"] is not None:
        out = s.call(c, aten.mul.Tensor, out, along(s, c, c["weight"], x.ndim))
    if c["bias"] is not None:
        out = s.call(c, aten.add.Tensor, out, along(s, c, c["bias"], x.ndim))
    n = x.val.numel() // x.shape[1]
    unbiased = s.call(c, aten.mul.Tensor, var, n / max(n - 1, 1))
    return (
        out,
        mean,
        rstd,
        running(s, c, c["running_mean"], mean),
        running(s, c, c["running_var"], unbiased),
    )


def along(s: Sharder, c: Call, stat: Value, ndim: int) -> Value:
    return s.call(c, aten.view.default, stat, [1, -1, *[1] * (ndim - 2)])


def running(s: Sharder, c: Call, old: Value, new: Value) -> Value:
    kept = s.call(c, aten.mul.Tensor, old, 1 - c["momentum"])
    new = s.call(c, aten.detach.default, new)
    return s.call(c, aten.add.Tensor, kept, s.call(c, aten.mul.Tensor, new, c["momentum"]))


def convolution(s: Sharder, c: Call) -> Value:
    x = c["input"]
    if x.place is None or x.place.dim != 0 or x.ndim < 3:
        return s.gather_for(c, "slides over the axis")
    return s.emit(c, x.place, **others_whole(s, c))
