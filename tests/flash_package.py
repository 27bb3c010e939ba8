"""The package flash_attn as far as tests need it: its functions, for CPUs, text by text.

As there they are autograd.Functions around ops of their own, which Dynamo cannot look into.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Texts = Iterator[tuple[slice, slice]]


def texts(begins: Tensor, key_begins: Tensor) -> Texts:
    """Where the queries and the keys of each text are."""
    a, b = begins.tolist(), key_begins.tolist()
    for n in range(len(a) - 1):
        yield slice(a[n], a[n + 1]), slice(b[n], b[n + 1])


def weights_of(q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int) -> Tensor:
    """Of one text: its last query stands beside its last key."""
    i, j = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
    right = 0 if causal else right
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    hidden |= (j < i - left) if left >= 0 else hidden
    hidden |= (j > i + right) if right >= 0 else hidden
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).nan_to_num(0.0)


@torch.library.custom_op("flash_package::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, key_begins: Tensor,
    scale: float, causal: bool, left: int, right: int,
) -> Tensor:  # fmt: skip
    out = torch.zeros_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for mine, theirs in texts(begins, key_begins):
        weights = weights_of(q[mine], k[theirs], scale, causal, left, right)
        out[mine] = torch.einsum("hij,jhd->ihd", weights, v[theirs])
    return out


@torch.library.custom_op("flash_package::backward", mutates_args=())
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, key_begins: Tensor,
    scale: float, causal: bool, left: int, right: int,
) -> list[Tensor]:  # fmt: skip
    groups, shape = q.shape[1] // k.shape[1], k.shape
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for mine, theirs in texts(begins, key_begins):
        weights = weights_of(q[mine], k[theirs], scale, causal, left, right)
        dv[theirs] = torch.einsum("hij,ihd->jhd", weights, dout[mine])
        dweights = torch.einsum("ihd,jhd->hij", dout[mine], v[theirs])
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dq[mine] = torch.einsum("hij,jhd->ihd", dscores, k[theirs])
        dk[theirs] = torch.einsum("hij,ihd->jhd", dscores, q[mine])
    return [dq, *(x.unflatten(1, (shape[1], groups)).sum(2) for x in (dk, dv))]


forward.register_fake(lambda q, *rest: torch.empty_like(q))
backward.register_fake(lambda dout, q, k, v, *rest: [torch.empty_like(x) for x in (q, k, v)])


class Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, begins, key_begins, *options):
        ctx.save_for_backward(q, k, v, begins, key_begins)
        ctx.options = options
        return torch.ops.flash_package.forward(q, k, v, begins, key_begins, *options)

    @staticmethod
    def backward(ctx: Any, dout):
        grads = torch.ops.flash_package.backward(dout, *ctx.saved_tensors, *ctx.options)
        return (*grads, *[None] * 6)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return Packed.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, *window_size)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    begins = [torch.arange(len(x) + 1) * x.shape[1] for x in (q, k)]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return Packed.apply(*flat, *begins, scale, causal, *window_size).view(q.shape)


package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
for function in (flash_attn_func, flash_attn_varlen_func):
    function.__module__ = interface.__name__
    for module in (package, interface):
        setattr(module, function.__name__, function)


@contextmanager
def installed() -> Iterator[None]:
    """As if the package were there, and imported; transformers looks for it in its own way."""
    modules = {x.__name__: x for x in (package, interface)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
