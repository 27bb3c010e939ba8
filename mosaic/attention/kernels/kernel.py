"""What a kernel of the table is, what it is chosen by, and what all kernels need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.blocks import Piece
from mosaic.attention.merge import Partial
from mosaic.attention.structure import Structure
from mosaic.attention.tiles import TileProgram


class Gradients(NamedTuple):
    """Of q, k and v; of a mask that needs one; and of the learned leaves of a score program."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    leaves: tuple[Tensor, ...] = ()


#: Row i sees key j where lower <= j - i <= upper.
Bounds = tuple[int | None, int | None]


#: A ``Case``'s mask that is no tensor but a ``Structure``; one that says which keys all queries and
#: heads see.
STRUCTURE, KEYS = "structure", "keys"
#: What changes a ``Case``'s scores: a softcap alone, or a program of numbers at the query and the
#: key, or of tables.
SOFTCAP, CHANGED, TABLES = "softcap", "changed", "tables"


def change_of(*programs: str) -> str:
    """What a ``Case`` says of the programs that change its scores, or add to them; "" if none."""
    parsed = [TileProgram.parse(program) for program in programs if program]
    if any(program.has_tables for program in parsed):
        return TABLES
    if len(parsed) == 1 and parsed[0].softcap:
        return SOFTCAP
    return CHANGED if parsed else ""


class Case(NamedTuple):
    """All that the choice of a kernel depends on, beside the band. ``program`` and the dtypes of
    its ``leaves`` are a ``Structure``'s; ``heads`` are those of all batches."""

    device: str
    capability: int
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    mask: torch.dtype | str | None
    dropout: bool
    empty: bool
    scores: str = ""
    heads: int = 1
    program: str = ""
    leaves: tuple[torch.dtype, ...] = ()

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Structure | None,
        dropout: bool,
        scores: Structure | None = None,
    ) -> Case:
        return cls(
            q.device.type,
            capability(q.device),
            q.dtype,
            q.shape[-1],
            v.shape[-1],
            _mask_of(mask),
            dropout,
            q.numel() == 0 or k.numel() == 0,
            change_of(scores.program) if scores else "",
            q.shape[0] * q.shape[1],
            *_program_of(mask),
        )

    @property
    def plain(self) -> bool:
        """No mask, no dropout, scores as they are, and something to do: what the fast kernels are
        made for."""
        return self.mask is None and not (self.dropout or self.empty or self.scores)

    @property
    def capped(self) -> bool:
        """As ``plain``, but for a softcap."""
        return self.scores == SOFTCAP and self._replace(scores="").plain

    @property
    def is_structured(self) -> bool:
        return self.mask in (STRUCTURE, KEYS)

    @property
    def half_on_cuda(self) -> bool:
        return self.device == "cuda" and self.dtype in (torch.float16, torch.bfloat16)


def _mask_of(mask: Tensor | Structure | None) -> torch.dtype | str | None:
    if isinstance(mask, Structure):
        return KEYS if mask.is_of_keys else STRUCTURE
    return None if mask is None else mask.dtype


def _program_of(mask: Tensor | Structure | None) -> tuple[str, tuple[torch.dtype, ...]]:
    if not isinstance(mask, Structure):
        return "", ()
    return mask.program, tuple(leaf.dtype for leaf in mask.leaves)


@cache
def capability(device: torch.device) -> int:
    """9 is Hopper; 0 where there is no such device, as when a graph is traced elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


#: CUDA kernels have the batch in the second or third dim of their grid, which holds no more. (ATen
#: cuts it itself for the memory-efficient one, but its backward then has other strides than those
#: that it is traced with, up to torch 2.11 at least: github.com/pytorch/pytorch/issues/180445.)
MOST_BATCHES = 65535


class Kernel(NamedTuple):
    """A line of the table.

    ``bands``: "none" has them in its mask; "square" does all keys or the triangle of a square;
    "tile" does any band, at the cost of rows x keys; "native" does any band, at the cost of what is
    seen; "short" does so with no more rows than keys (flash attention 2 takes a right side as long
    as the keys for unbounded).
    ``most_batches``: in one call. ``most_tokens``: of rows, and of keys.
    """

    name: str
    fits: Callable[[Case], bool]
    bands: Literal["none", "square", "tile", "native", "short"]
    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]
    most_batches: int | None = None
    most_tokens: int | None = None

    def does(self, case: Case, piece: Piece) -> bool:
        if not self.fits(case) or self.is_short_of(piece):
            return False
        if self.bands == "none":
            return piece.band == (None, None)
        if self.bands == "square":
            several = piece.rows * piece.keys > 1  # cuDNN refuses one query with one key
            return several and (piece.causal or piece.band == (None, None))
        return self.bands == "tile" or self.is_whole(piece)

    def is_short_of(self, piece: Piece) -> bool:
        """Whether a piece has more rows or keys than it can do."""
        return self.most_tokens is not None and max(piece.rows, piece.keys) > self.most_tokens

    def is_whole(self, piece: Piece) -> bool:
        """Whether it does a band in one piece, at the cost of what is seen."""
        short = piece.upper is None or piece.rows <= piece.keys
        fits = self.bands == "native" or (self.bands == "short" and short)
        return fits and piece.is_tight


def window(band: Bounds, s: int, t: int) -> Bounds:
    """(left, right) of a kernel that aligns the last row with the last key; None is unbounded.

    Neither is negative for a piece that is tight, so that -1 can mean unbounded.
    """
    lower, upper = band
    return None if lower is None else t - s - lower, None if upper is None else upper - (t - s)


def whole_lse(lse: Tensor, s: int) -> Tensor:
    """(batch, heads, s), contiguous. cuDNN adds a dim of 1, the memory-efficient kernel pads rows,
    and CPU flash lays out (batch, s, heads). What kernels say of a row that sees no key (FA2 +inf,
    CPU flash 0, FA4 -inf) does not matter: without a mask no row of a tight piece is like that."""
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return (lse if lse.shape[2] == s else lse[:, :, :s]).contiguous()


def multiple_of_8(n: int) -> int:
    return multiple_of(8, n)


def multiple_of(step: int, n: int) -> int:
    """The next one, from n on."""
    return -(-n // step) * step


def widened(x: Tensor, dim: int) -> Tensor:
    """Zeros behind head_dim: they change no score and add empty columns to the output."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def narrowed(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else x[..., :dim]


def without_padding(grads: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """The gradients of q, k and v of those of their widened forms; there is no mask."""
    dq, dk, dv = grads
    dims = [x.shape[-1] for x in (q, k, v)]
    return Gradients(narrowed(dq, dims[0]), narrowed(dk, dims[1]), narrowed(dv, dims[2]))


def seq_first(x: Tensor) -> Tensor:
    """(batch, heads, seq, dim) <-> (batch, seq, heads, dim), as a view."""
    return x.transpose(1, 2)
