"""A small vision transformer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, embed: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(embed, 3 * embed)
        self.proj = nn.Linear(embed, embed)

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, e))


class Block(nn.Module):
    def __init__(self, embed: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed)
        self.attn = Attention(embed, heads)
        self.norm2 = nn.LayerNorm(embed)
        self.mlp = nn.Sequential(
            nn.Linear(embed, 4 * embed), nn.GELU(), nn.Linear(4 * embed, embed)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """``pool="cls"`` reads the class token in front, ``"mean"`` the mean of the patches."""

    def __init__(
        self,
        image: int = 32,
        patch: int = 8,
        channels: int = 3,
        embed: int = 32,
        heads: int = 4,
        layers: int = 2,
        classes: int = 10,
        pool: Literal["cls", "mean"] = "cls",
    ):
        super().__init__()
        self.pool = pool
        self.patches = nn.Conv2d(channels, embed, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, embed))
        self.blocks = nn.ModuleList(Block(embed, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embed)
        self.head = nn.Linear(embed, classes)

    def forward(
        self, images: Tensor, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(dim=1)
        logits = self.head(pooled)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits, targets)
