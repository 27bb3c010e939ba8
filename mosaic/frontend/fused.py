"""torch's fused ops, said in ops that show what they do: attention, and writes to buffers.

In eval mode and without gradients ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call
one fused op each, which hides the attention; ``instance_norm`` hides that it writes to its running
statistics. These are the same computations, op by op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.torch_private import encoder_layer_op, multi_head_attention_op


def attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, change: Callable[[Tensor], Tensor],
    seen: Tensor | None = None, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as it is defined, of (batch, heads, seq, dim) with grouped queries: the output, and
    the scores, which ``change`` gives and which are -inf where a key is not ``seen``. A query that
    sees no key gives 0. ``passes/raise_attention.py`` finds it."""
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = change((q @ k.transpose(-2, -1)).to(working) * scale)
    if seen is not None:
        scores = torch.where(seen, scores, -math.inf)
    weights = torch._safe_softmax(scores, -1)
    if dropout:
        weights = torch.dropout(weights, dropout, True)
    return weights.to(q.dtype) @ v, scores


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int,
    qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    mask: Tensor | None = None, need_weights: bool = True, average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``torch._native_multi_head_attention``: ``(batch, seq, embed)`` in and out."""
    parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (num_head, -1)).transpose(1, 2) for x, w, b in parts)
    bias = additive(mask, mask_type, q)
    weights = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = torch.softmax(scores if bias is None else scores + bias, -1)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    out = F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    return out, weights.mean(1) if weights is not None and average_attn_weights else weights


def additive(mask: Tensor | None, mask_type: int | None, like: Tensor) -> Tensor | None:
    """The op's masks as one that is added to the scores: 0 attention, 1 padding, 2 both."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask[:, None, None, :] if mask_type == 1 else mask


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``: ``(batch, seq, embed)`` in and out."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return multi_head_attention(
            x, x, x, embed_dim, num_heads, *weights, mask, False, mask_type=mask_type
        )[0]

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``F.instance_norm``: a batch norm in which every sample has channels of its own."""
    if running_mean is None or running_var is None:
        stats = (running_mean, running_var, weight, bias)
        return F.instance_norm(input, *stats, use_input_stats, momentum, eps)
    batch, channels = input.shape[:2]
    mean, var = running_mean.repeat(batch), running_var.repeat(batch)
    scale, shift = (x if x is None else x.repeat(batch) for x in (weight, bias))
    flat = input.reshape(1, batch * channels, *input.shape[2:])
    out = F.batch_norm(flat, mean, var, scale, shift, use_input_stats, momentum, eps)
    if use_input_stats:
        for kept, new in ((running_mean, mean), (running_var, var)):
            kept.copy_(new.view(batch, channels).mean(0))
    return out.reshape(input.shape)


#: What capture runs in place of a fused op.
UNFUSED: dict[Any, Any] = {
    encoder_layer_op: encoder_layer,
    multi_head_attention_op: multi_head_attention,
    F.instance_norm: instance_norm,
    torch.instance_norm: lambda *args: instance_norm(*args[:8]),
}
