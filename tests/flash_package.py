"""The package flash_attn as far as tests need it: its functions, for CPUs, text by text.

As there they are autograd.Functions around ops of their own, which Dynamo cannot look into.
Versions 2, 3 and 4 differ in where they are, in what they take and in what they give.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import _pad_input as pad_input
from transformers.modeling_flash_attention_utils import _unpad_input as unpad_input

Texts = Iterator[tuple[slice, slice]]


def texts(begins: Tensor, key_begins: Tensor) -> Texts:
    """Where the queries and the keys of each text are."""
    a, b = begins.tolist(), key_begins.tolist()
    for n in range(len(a) - 1):
        yield slice(a[n], a[n + 1]), slice(b[n], b[n + 1])


def scores_of(q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int) -> Tensor:
    """Of one text: its last query stands beside its last key."""
    i, j = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
    right = 0 if causal else right
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    hidden |= (j < i - left) if left >= 0 else hidden
    hidden |= (j > i + right) if right >= 0 else hidden
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return scores.masked_fill(hidden, float("-inf"))


@torch.library.custom_op("flash_package::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, key_begins: Tensor,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = torch.zeros_like(q), q.new_zeros([q.shape[1], len(q)], dtype=torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for mine, theirs in texts(begins, key_begins):
        scores = scores_of(q[mine], k[theirs], scale, causal, left, right)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out[mine] = torch.einsum("hij,jhd->ihd", weights, v[theirs])
        lse[:, mine] = scores.logsumexp(-1).float()
    return out, lse


@torch.library.custom_op("flash_package::backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, key_begins: Tensor,
    scale: float, causal: bool, left: int, right: int,
) -> list[Tensor]:  # fmt: skip
    groups, shape = q.shape[1] // k.shape[1], k.shape
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for mine, theirs in texts(begins, key_begins):
        scores = scores_of(q[mine], k[theirs], scale, causal, left, right)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        dv[theirs] = torch.einsum("hij,ihd->jhd", weights, dout[mine])
        dweights = torch.einsum("ihd,jhd->hij", dout[mine], v[theirs])
        lost = (weights * dweights).sum(-1, keepdim=True) - dlse[:, mine, None]
        dscores = weights * (dweights - lost) * scale
        dq[mine] = torch.einsum("hij,jhd->ihd", dscores, k[theirs])
        dk[theirs] = torch.einsum("hij,ihd->jhd", dscores, q[mine])
    return [dq, *(x.unflatten(1, (shape[1], groups)).sum(2) for x in (dk, dv))]


@forward.register_fake
def _(q, *rest):
    return torch.empty_like(q), q.new_empty([q.shape[1], len(q)], dtype=torch.float32)


@backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return [torch.empty_like(x) for x in (q, k, v)]


class Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, begins, key_begins, *options):
        ctx.save_for_backward(q, k, v, begins, key_begins)
        ctx.options = options
        return torch.ops.flash_package.forward(q, k, v, begins, key_begins, *options)

    @staticmethod
    def backward(ctx: Any, dout, dlse):
        grads = torch.ops.flash_package.backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return (*grads, *[None] * 6)


def of_texts(q, k, v, begins, key_begins, scale, causal, window) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = [-1 if x is None else x for x in window]
    return Packed.apply(q, k, v, begins, key_begins, scale, causal, *window)


def of_batches(q, k, v, *options) -> tuple[Tensor, Tensor]:
    begins = [torch.arange(len(x) + 1) * x.shape[1] for x in (q, k)]
    out, lse = of_texts(*(x.flatten(0, 1) for x in (q, k, v)), *begins, *options)
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def given(found, asked):
    """As version 2 gives it; the log-sum-exp has no gradient there."""
    out, lse = found
    return (out, lse.detach(), out.new_empty(0)) if asked else out


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return given(of_batches(q, k, v, softmax_scale, causal, window_size), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = of_batches(*qkv.unbind(2), softmax_scale, causal, window_size)
    return given(found, return_attn_probs)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    found = of_batches(q, *kv.unbind(2), softmax_scale, causal, window_size)
    return given(found, return_attn_probs)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    options = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)
    return given(of_texts(q, k, v, *options), return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    options = (cu_seqlens, cu_seqlens, softmax_scale, causal, window_size)
    return given(of_texts(*qkv.unbind(1), *options), return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    options = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)
    return given(of_texts(q, *kv.unbind(1), *options), return_attn_probs)


def flash_attn_with_kvcache(*args, **kwargs):
    raise AssertionError("for decoding, which no test does")


class Third:
    """The functions of version 3."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        out, lse = of_batches(q, k, v, softmax_scale, causal, window_size)
        return (out, lse.detach()) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1),
        softcap=0.0, num_splits=1, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        options = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)
        out, lse = of_texts(q, k, v, *options)
        return (out, lse.detach()) if return_attn_probs else out


class Fourth:
    """Those of version 4: there the log-sum-exp has a gradient, if it is asked for."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
        softcap=0.0, num_splits=1, deterministic=False, mask_mod=None, return_lse=False,
    ):  # fmt: skip
        out, lse = of_batches(q, k, v, softmax_scale, causal, window_size)
        return out, lse if return_lse else lse.detach()

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
        softcap=0.0, deterministic=False, return_lse=False,
    ):  # fmt: skip
        options = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)
        out, lse = of_texts(q, k, v, *options)
        return out, lse if return_lse else lse.detach()


def module(name: str, **members: Any) -> ModuleType:
    """A module of its own name, with functions that say that they are from there."""
    found = ModuleType(name)
    for key, member in members.items():
        member.__module__, member.__qualname__ = name, key
        setattr(found, key, member)
    return found


SECOND = [
    *(flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func),
    *(flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func),
]
interface = module("flash_attn.flash_attn_interface", **{f.__name__: f for f in SECOND})
third, fourth = (
    module(name, **{f.__name__: f for f in (x.flash_attn_func, x.flash_attn_varlen_func)})
    for name, x in (("flash_attn_interface", Third), ("flash_attn.cute.interface", Fourth))
)
padding = ModuleType("flash_attn.bert_padding")
padding.pad_input, padding.unpad_input = pad_input, unpad_input
package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
package.flash_attn_with_kvcache = flash_attn_with_kvcache
for outer, inner in ((package, interface), (cute, fourth)):
    vars(outer).update({k: x for k, x in vars(inner).items() if k.startswith("flash_attn")})


@contextmanager
def installed() -> Iterator[None]:
    """As if the package were there, and imported; transformers looks for it in its own way."""
    modules = {x.__name__: x for x in (package, interface, third, cute, fourth, padding)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
