"""A small Llama: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 where the model computes in less; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, embed: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(embed))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(widened(x.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary(n: int, head: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    wide = widened(like.dtype)
    pairs = torch.arange(0, head, 2, device=like.device, dtype=wide)
    angles = torch.outer(torch.arange(n, device=like.device, dtype=wide), base ** (-pairs / head))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class Attention(nn.Module):
    def __init__(self, embed: int, heads: int, kv_heads: int, repeat_kv: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, embed // heads
        self.repeat_kv = repeat_kv
        self.q = nn.Linear(embed, heads * self.head, bias=False)
        self.k = nn.Linear(embed, kv_heads * self.head, bias=False)
        self.v = nn.Linear(embed, kv_heads * self.head, bias=False)
        self.o = nn.Linear(heads * self.head, embed, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        if self.repeat_kv:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeat_kv)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class SwiGLU(nn.Module):
    def __init__(self, embed: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(embed, hidden, bias=False)
        self.up = nn.Linear(embed, hidden, bias=False)
        self.down = nn.Linear(hidden, embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, embed: int, heads: int, kv_heads: int, hidden: int, repeat_kv: bool):
        super().__init__()
        self.norm1 = RMSNorm(embed)
        self.attn = Attention(embed, heads, kv_heads, repeat_kv)
        self.norm2 = RMSNorm(embed)
        self.mlp = SwiGLU(embed, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """``repeat_kv`` copies the key heads, as older code does, and sdpa groups no queries."""

    def __init__(
        self,
        vocab: int = 97,
        embed: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        hidden: int = 48,
        layers: int = 2,
        rope_base: float = 10000.0,
        repeat_kv: bool = False,
    ):
        super().__init__()
        self.head_size, self.rope_base = embed // heads, rope_base
        self.tokens = nn.Embedding(vocab, embed)
        self.blocks = nn.ModuleList(
            Block(embed, heads, kv_heads, hidden, repeat_kv) for _ in range(layers)
        )
        self.norm = RMSNorm(embed)
        self.head = nn.Linear(embed, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids)
        cos, sin = rotary(ids.shape[1], self.head_size, self.rope_base, like=x)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits, None
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        return logits, loss
