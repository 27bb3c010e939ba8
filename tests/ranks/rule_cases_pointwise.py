"""Pointwise samples: every name that the rules add to torch's own tag, and many of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rule_case import Cases, b, constant, f, i, ties, unit

aten = torch.ops.aten
CASES = Cases()
add = CASES.add

SMOOTH = (
    "abs cos cosh erf erfc exp exp2 expm1 sigmoid sin sinh sinc square tan tanh "
    "atan asinh neg positive relu selu silu mish hardtanh relu6 hardsigmoid "
    "leaky_relu elu celu gelu hardshrink softplus softshrink sgn ceil floor round trunc frac sign "
    "deg2rad rad2deg nan_to_num i0 special_i0e special_i1 special_erfcx special_log_ndtr "
    "isnan isfinite isinf isposinf isneginf signbit logical_not"
).split()
POSITIVE = (
    "log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma acos asin atanh logit erfinv "
    "special_entr"
).split()
BINARY = (
    "add.Tensor sub.Tensor mul.Tensor maximum minimum fmin fmax hypot atan2 copysign.Tensor "
    "logaddexp logaddexp2 eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor "
    "logical_and logical_or logical_xor max.other min.other"
).split()
QUOTIENTS = (
    "div.Tensor remainder.Tensor fmod.Tensor pow.Tensor_Tensor xlogy.Tensor "
    "true_divide.Tensor float_power.Tensor_Tensor"
).split()
SCALARS = (
    "add.Scalar sub.Scalar mul.Scalar div.Scalar pow.Tensor_Scalar "
    "remainder.Scalar fmod.Scalar rsub.Scalar "
    "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar clamp_min clamp_max"
).split()
INTEGER = (
    "bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor gcd lcm __and__.Tensor "
    "__or__.Tensor __xor__.Tensor"
).split()
INTEGER_SCALAR = (
    "bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar bitwise_left_shift.Tensor_Scalar "
    "__and__.Scalar __or__.Scalar __xor__.Scalar"
).split()


def op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def each(names: list[str], *rest: object) -> Callable[..., list[Any]]:
    """All of these ops in one program: one capture for many."""
    return lambda *tensors: [op(name)(*tensors, *rest) for name in names]


add("smooth", each(SMOOTH), f(5, 2))
add("positive", each(POSITIVE), unit(5, 2))
add("binary", each(BINARY), f(5, 2), f(5, 2))
add("quotients", each(QUOTIENTS), unit(5, 2), unit(5, 2))
add("scalars", each(SCALARS, 0.3), unit(5, 2))
add("threshold", each(["threshold"], 0.3, 2.0), unit(5, 2))
add("integer", each(INTEGER), i(9, 5, 2), i(9, 5, 2))
add("integer scalar", each(INTEGER_SCALAR, 3), i(9, 5, 2))

# names of POINTWISE that are not above
add("bitwise_not", aten.bitwise_not.default, b(5, 2))
add("_to_copy", lambda x: aten._to_copy.default(x, dtype=torch.int64), f(5, 2))
add("alias", lambda x: aten.alias.default(x) * 2, f(5, 2))
add("clone", lambda x: x.clone() * 2, f(5, 2))
add(
    "clone format",
    lambda x: aten.clone(x.transpose(0, 1), memory_format=torch.contiguous_format),
    f(5, 2),
)
add("contiguous", lambda x: x.transpose(0, 1).contiguous() * 2, f(5, 2))
add("detach", lambda x: x.detach() * x, f(5, 2))
add("detach_copy", lambda x: aten.detach_copy.default(x) * x, constant(5, 2))
add("heaviside", torch.heaviside, constant(5, 2), constant(5, 2))
add("to other", lambda x, y: x.to(y) * 2, i(9, 5, 2), f(5, 2))
add("empty_like", lambda x: aten.zeros_like.default(aten.empty_like.default(x)), f(5, 2))
add("fill.Scalar", lambda x: aten.fill.Scalar(x, 3.0) * x, f(5, 2))
add("fill.Tensor", lambda x, v: aten.fill.Tensor(x, v) * x, f(5, 2), f())
add("zero", lambda x: aten.zero(x * 2) + x, f(5, 2))
add("full_like", lambda x: aten.full_like.default(x, 2.5) * x, f(5, 2))
add("ones_like", lambda x: torch.ones_like(x) * x, f(5, 2))
add("zeros_like", lambda x: torch.zeros_like(x) + x, f(5, 2))
add("masked_fill.Scalar", lambda x, m: x.masked_fill(m, -2.0), f(5, 2), b(5, 2))
add("masked_fill.Tensor", lambda x, m, v: x.masked_fill(m, v), f(5, 2), b(5, 2), f())
add("masked_fill row", lambda x, m: x.masked_fill(m, -2.0), f(5, 2), b(5, 1))
add("to.dtype", lambda x: x.to(torch.float32).to(torch.float64), f(5, 2), tol=1e-6)
add("type_as", lambda x, y: x.type_as(y), i(9, 5, 2), f(5, 2))
add("where.self", torch.where, b(5, 2), f(5, 2), f(5, 2))
add("where broadcast", torch.where, b(5, 1), f(2), f(5, 2))
add("where.ScalarOther", lambda m, x: aten.where.ScalarOther(m, x, 1.5), b(5, 2), f(5, 2))
add("where.ScalarSelf", lambda m, x: aten.where.ScalarSelf(m, 1.5, x), b(5, 2), f(5, 2))
add("where.Scalar", lambda m: aten.where.Scalar(m, 1.5, 2.5), b(5, 2))

# more shapes of the same rule
add("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.5), f(5, 2), f(5, 2), f(5, 2))
add("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), f(5, 2), f(5, 2), unit(5, 2))
add("lerp.Scalar", lambda x, y: torch.lerp(x, y, 0.3), f(5, 2), f(5, 2))
add("lerp.Tensor", torch.lerp, f(5, 2), f(5, 2), f(5, 2))
add("clamp", lambda x: torch.clamp(x, -0.5, 0.5), f(5, 2))
add("clamp.Tensor", lambda x, lo: torch.clamp(x, min=lo), f(5, 2), f(5, 2))
add("clip", lambda x: aten.clip.default(x, -0.5, 0.5), f(5, 2))
add("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), f(5, 2))
add("add alpha", lambda x, y: torch.add(x, y, alpha=2), f(5, 2), f(5, 2))
add("rsub", lambda x: 1 - x, f(5, 2))
add("div mode", lambda x, y: torch.div(x, y, rounding_mode="floor"), f(5, 2), unit(5, 2))
add("pow.Scalar", lambda x: 2.0**x, f(5, 2))
add("frexp", lambda x: torch.frexp(x), constant(5, 2))
add("bool of ints", lambda x: (x > 3) & ~(x == 5), i(9, 5, 2))
add("complex mask", lambda x, m: x * m.to(x.dtype) + m, f(5, 2), b(5, 2))

# broadcasting: who has the axis, who has a length of 1, who lacks the dim
add("add row", torch.add, f(5, 2), f(2))
add("add column", torch.add, f(5, 2), f(5, 1))
add("outer", torch.mul, f(5, 1), f(1, 4))
add("outer equal", torch.mul, f(5, 1), f(1, 5))
add("rank differs", torch.mul, f(2, 5, 4), f(5, 1))
add("scalar tensor", torch.mul, f(5, 2), f())
add("lengths of 1", torch.mul, f(1, 1), f(1, 1))
add("same twice", lambda x: x * x + torch.maximum(x, x), ties(3, 5, 2))
add("vector", lambda x: x.sin() * 2, f(7))
add("with its transpose", lambda x: x + x.transpose(0, 1), f(5, 5))
add("empty dim", lambda x: x * 2, f(5, 0))
add("promotes", lambda x, y: x + y, i(5, 5, 2), f(5, 2))
add("int division", lambda x, y: x // y, i(9, 5, 2), constant(5, 2))
add("backwards", aten.gelu_backward.default, constant(5, 2), constant(5, 2))
add("sigmoid_backward", aten.sigmoid_backward.default, constant(5, 2), constant(5, 2))
add("tanh_backward", aten.tanh_backward.default, constant(5, 2), constant(5, 2))
add("silu_backward", aten.silu_backward.default, constant(5, 2), constant(5, 2))
add(
    "threshold_backward",
    lambda g, x: aten.threshold_backward.default(g, x, 0.5),
    constant(5, 2),
    constant(5, 2),
)

# created tensors, used as operands of sharded work
add("zeros", lambda x: x + torch.zeros(5, 2, dtype=x.dtype), f(5, 2))
add("ones", lambda x: x + torch.ones(5, 2, dtype=x.dtype), f(5, 2))
add("full", lambda x: x * torch.full((5, 2), 3.0, dtype=x.dtype), f(5, 2))
add("empty", lambda x: x + torch.empty(5, 2, dtype=x.dtype).fill_(2.0), f(5, 2))
add("arange", lambda x: x * torch.arange(5).unsqueeze(1), f(5, 2))
add("new_full", lambda x: x * x.new_full((5, 2), 2.0) + x.new_zeros(2) + x.new_ones(5, 1), f(5, 2))
add("ones in two layouts", lambda x: x[1:] + torch.ones(4, 2, dtype=x.dtype), f(5, 2))
add("linspace", lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype).unsqueeze(1), f(5, 2))
add("eye", lambda x: x * torch.eye(5, dtype=x.dtype), f(5, 5))
