"""What a kernel of the table is, and what it is chosen by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.attention.blocks import Piece
from mosaic.attention.merge import Partial

#: dq, dk, dv, and the gradient of a mask that needs one.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Case(NamedTuple):
    """All that the choice of a kernel depends on, beside the band."""

    device: str
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    mask: torch.dtype | None
    dropout: bool
    empty: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: bool) -> Case:
        empty = q.numel() == 0 or k.numel() == 0
        mask_dtype = None if mask is None else mask.dtype
        dims = q.shape[-1], v.shape[-1]
        return cls(q.device.type, q.dtype, *dims, mask_dtype, dropout, empty)

    @property
    def plain(self) -> bool:
        """No mask, no dropout, and something to do: what the fast kernels are made for."""
        return self.mask is None and not self.dropout and not self.empty


class Kernel(NamedTuple):
    """A line of the table. ``any_band``: else it does all keys, or the triangle of a square."""

    name: str
    fits: Callable[[Case], bool]
    any_band: bool
    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]

    def does(self, case: Case, piece: Piece) -> bool:
        return self.fits(case) and (self.any_band or piece.causal or piece.band == (None, None))
