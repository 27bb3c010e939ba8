"""Models whose blocks are compiled one by one, in many lengths: masks made between the blocks, and
blocks that have no form for padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from length_jobs import WORDS
from torch import Tensor, nn

E = 16


class Block(nn.Module):
    """Attends as a mask says that the model made. ``kind``: what else it does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out, self.norm = nn.Linear(E, 3 * E), nn.Linear(E, E), nn.LayerNorm(E)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        if self.kind == "breaks":
            torch._dynamo.graph_break()
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        x = x * (1 + positions[:, None] / 100)
        if self.kind == "flips":
            return x + x.flip(1)
        if self.kind == "divides":
            return x - x.sum(1, keepdim=True) / x.shape[1]
        return x


class Masked(nn.Module):
    """Its mask is causal, with a window, in eager code; its loss is too."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, E), nn.Linear(E, WORDS)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        apart = positions[:, None] - positions
        mask = (apart >= 0) & (apart < 9)
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, mask, positions)
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())


def masked(kind: str = "") -> nn.Module:
    return Masked(kind).double()
