"""A decoder as language models are built, of any number of layers, with tiny widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mosaic
from mosaic.report.plan import Plan


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.up, self.gate, self.down = (
            nn.Linear(*sizes) for sizes in ((dim, 2 * dim), (dim, 2 * dim), (2 * dim, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            project(y).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, layers: int, dim: int = 16, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.embed = nn.Embedding(32, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def explained(layers: int, p: int, method: str = "auto", *, named: bool = True) -> Plan:
    """The plan of a decoder on ``p`` ranks; its axis is named, or has to be found."""
    torch._dynamo.reset()
    spec = mosaic.ShardingSpec(inputs={"ids": "batch seq"}, axes={"seq": method})
    ids = torch.zeros(1, max(512, 4 * p), dtype=torch.long)
    return mosaic.explain(Decoder(layers), ids, spec=spec if named else None, sp_size=p)
