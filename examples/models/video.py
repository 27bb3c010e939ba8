"""A small transformer of video: every moment of every patch attends to every other."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

EMBED, HEADS, CHANNELS = 32, 4, 3


class Attention(nn.Module):
    """Between all tokens of (batch, times, places, embed). It knows of one device only."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(EMBED, EMBED), nn.Linear(EMBED, EMBED)
        self.v_proj, self.out_proj = nn.Linear(EMBED, EMBED), nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in layers)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.out_proj(out).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.norm1, self.norm2 = attention, nn.LayerNorm(EMBED), nn.LayerNorm(EMBED)
        self.mlp = nn.Sequential(
            nn.Linear(EMBED, 2 * EMBED), nn.GELU(), nn.Linear(2 * EMBED, EMBED)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Video(nn.Module):
    """Removes noise: clip and output are (batch, times, places, channels)."""

    def __init__(self, attention: Callable[[], nn.Module], layers: int = 1):
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, EMBED), nn.Linear(EMBED, CHANNELS)
        self.blocks = nn.Sequential(*(Block(attention()) for _ in range(layers)))

    def forward(self, clip: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(clip)))
