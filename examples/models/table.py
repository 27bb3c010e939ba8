"""A small tabular transformer in the way of nanoTabPFN: it attends over columns, then over rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureEncoder(nn.Module):
    """Every cell, normalised by the training rows of its column, becomes a vector."""

    def __init__(self, embed: int):
        super().__init__()
        self.linear = nn.Linear(1, embed)

    def forward(self, x: Tensor, split: int) -> Tensor:
        mean = x[:, :split].mean(dim=1, keepdim=True)
        std = x[:, :split].std(dim=1, keepdim=True) + 1e-6
        x = ((x - mean) / std).clamp(-100, 100)
        return self.linear(x.unsqueeze(-1))


class TargetEncoder(nn.Module):
    """Training targets, and their mean in place of the test targets, become vectors."""

    def __init__(self, embed: int):
        super().__init__()
        self.linear = nn.Linear(1, embed)

    def forward(self, y: Tensor, rows: int) -> Tensor:
        padding = y.mean(dim=1, keepdim=True).repeat(1, rows - y.shape[1])
        y = torch.cat([y, padding], dim=1)
        return self.linear(y.unsqueeze(-1)).unsqueeze(2)


class Block(nn.Module):
    def __init__(self, embed: int, heads: int, hidden: int):
        super().__init__()
        self.between_columns = nn.MultiheadAttention(embed, heads, batch_first=True)
        self.between_rows = nn.MultiheadAttention(embed, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(embed, hidden), nn.GELU(), nn.Linear(hidden, embed))
        self.norm1 = nn.LayerNorm(embed)
        self.norm2 = nn.LayerNorm(embed)
        self.norm3 = nn.LayerNorm(embed)

    def forward(self, x: Tensor, split: int) -> Tensor:
        b, rows, cols, e = x.shape
        x = x.reshape(b * rows, cols, e)
        x = self.norm1(x + self.between_columns(x, x, x)[0])
        x = x.reshape(b, rows, cols, e).transpose(1, 2).reshape(b * cols, rows, e)
        # Test rows look at training rows only, never at each other.
        train = self.between_rows(x[:, :split], x[:, :split], x[:, :split])[0]
        test = self.between_rows(x[:, split:], x[:, :split], x[:, :split])[0]
        x = self.norm2(x + torch.cat([train, test], dim=1))
        x = x.reshape(b, cols, rows, e).transpose(1, 2)
        return self.norm3(x + self.mlp(x))


class TableModel(nn.Module):
    """Predicts the targets of the rows after ``split`` from the rows before it, in one pass."""

    def __init__(
        self, embed: int = 32, heads: int = 4, hidden: int = 64, layers: int = 2, outputs: int = 2
    ):
        super().__init__()
        self.features = FeatureEncoder(embed)
        self.target = TargetEncoder(embed)
        self.blocks = nn.ModuleList(Block(embed, heads, hidden) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(embed, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor, y: Tensor, split: int) -> Tensor:
        """x: (batch, rows, columns), y: (batch, split) -> (batch, rows - split, outputs)."""
        cells = torch.cat([self.features(x, split), self.target(y, x.shape[1])], dim=2)
        for block in self.blocks:
            cells = block(cells, split)
        return self.head(cells[:, split:, -1])

    def loss(self, x: Tensor, y: Tensor, split: int) -> Tensor:
        """Cross entropy on the test rows; y holds the classes of all rows."""
        logits = self(x, y[:, :split].to(x.dtype), split)
        return F.cross_entropy(logits.flatten(0, 1), y[:, split:].flatten())
