"""Models with two axes to cut: tables of (batch, rows, columns, features), small, float64."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, HEADS = 8, 2


class Attention(nn.Module):
    """Self attention over dim -2 of (..., n, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.out(y.transpose(-3, -2).flatten(-2))


class Cells(nn.Module):
    """A table whose cells become vectors; subclasses say what happens then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, E)
        self.first, self.second = Attention(), Attention()
        self.norm = nn.LayerNorm(E)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(self.embed(x.unsqueeze(-1))).square().mean()

    def cells(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Flattened(Cells):
    """One attention over all cells."""

    causal = False
    masked = False

    def cells(self, x: Tensor) -> Tensor:
        b, r, c, _ = x.shape
        flat = x.reshape(b, r * c, E)
        at = torch.arange(r * c)
        near = (at[:, None] - at[None, :]).abs() <= 2 * c if self.masked else None
        y = self.first(flat, near, self.causal) + flat
        return self.norm(y).reshape(b, r, c, E) * x


class FlattenedCausal(Flattened):
    causal = True


class FlattenedMasked(Flattened):
    masked = True


Built = tuple[nn.Module, tuple[Tensor, ...], dict]


def built(kind: type[Cells], rows: int = 7, columns: int = 5) -> Built:
    model = kind().double()
    return model, (torch.randn(2, rows, columns).double().requires_grad_(),), {}


CASES = {
    kind.__name__: partial(built, kind) for kind in (Flattened, FlattenedCausal, FlattenedMasked)
}
