"""Masks that are known when a program is compiled, as a model writes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Of the positions of queries (n, 1) and of keys (n), 16 to a rank.
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda i, j: j <= i,
    "window": lambda i, j: (j <= i) & (j > i - 5),
    "both sides": lambda i, j: (j - i).abs() <= 3,
    "causal blocks": lambda i, j: (i // 16 == j // 16) & (j <= i),  # Llama 4
    "blocks across ranks": lambda i, j: i // 24 == j // 24,
    "prefix of blocks": lambda i, j: ((i // 32 == j // 32) | (j < 8)) & (j <= i),
    "stripes": lambda i, j: (i - j) % 16 < 2,
}


def attends(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        mask = MASKS[name](at[:, None], at)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return program
