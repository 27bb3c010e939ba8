"""Ops without a row of the table, which run by their decompositions."""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import mosaic
from mosaic.partition import decomposed


def layers(x: Tensor) -> Tensor:
    for scale in (1, 1, 1.5):
        x = F.scaled_dot_product_attention(x, x, x)
        x = torch.renorm(x, 2, 0, scale)
    return x


def test_equal_calls_are_traced_once() -> None:
    """In all layers, and each time that the rules follow them; 1.5 is another call than 1."""
    with mock.patch.object(decomposed, "make_fx", wraps=decomposed.make_fx) as traced:
        mosaic.explain(layers, torch.randn(2, 3, 8, 4), sp_size=2)
    assert traced.call_count == 2
