"""One block of attention: some queries, some keys, and the table of kernels that can do it.

Forward gives the log-sum-exp beside the output; backward takes the *global* output and
log-sum-exp, so that the gradients of blocks add up to the whole one's.

    q (batch, heads, s, d)   k (batch, kv_heads, t, d)   v (batch, kv_heads, t, e)
    out (batch, heads, s, e)   lse (batch, heads, s), natural log, float32 (float64 for float64)

``band`` is (lower, upper): row i sees key j where lower <= j - i <= upper, None is unbounded.
``mask`` is (batch|1, heads|1, s|1, t|1), boolean (True attends) or added to the scores.
``keep`` is a dropout mask, 0 or 1 / (1 - p). ``shift`` (batch|1, heads|1, s|1, 1) is taken off
every score of a row, of all blocks alike. A row that sees no key has out 0, lse -inf and no
gradient.

Which kernel does a block depends on shapes, dtypes, the device and the band, never on values, so
that every choice is made when a graph is traced.
"""

from __future__ import annotations

from torch import Tensor

from mosaic.attention.blocks import Piece, row_blocks, simple
from mosaic.attention.kernels import aten
from mosaic.attention.kernels.kernel import Case, Gradients, Kernel
from mosaic.attention.kernels.math import MATH
from mosaic.attention.merge import Partial

__all__ = ["KERNELS", "Case", "Gradients", "backward", "cut", "forward"]

#: Which kernel does a block: the first that fits. ``MATH`` is right for everything.
KERNELS: tuple[Kernel, ...] = (aten.CUDA_FLASH, aten.CPU_FLASH, MATH)


def forward(
    q,
    k,
    v,
    *,
    band: tuple[int | None, int | None],
    mask: Tensor | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
) -> Partial:
    """out and lse of one block."""
    options = {"band": band, "mask": mask, "scale": scale, "keep": keep, "shift": shift}
    kernel = _choose(Case.of(q, k, v, mask, keep is not None), _piece(q, k, band))
    return kernel.forward(q, k, v, **options)


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    band: tuple[int | None, int | None],
    mask: Tensor | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
    need_dmask: bool = False,
) -> Gradients:
    """This block's part of dq, dk, dv (and of the mask's gradient, in the mask's shape)."""
    options = {
        "band": band,
        "mask": mask,
        "scale": scale,
        "keep": keep,
        "shift": shift,
        "need_dmask": need_dmask,
    }
    kernel = _choose(Case.of(q, k, v, mask, keep is not None), _piece(q, k, band))
    return kernel.backward(dout, q, k, v, out, lse, **options)


def cut(case: Case, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces of a block, as the kernels that will do them want them: whole for a kernel that
    knows bands; rectangles and triangles; or, with neither, blocks of rows."""
    return tuple(part for piece in pieces for part in _cut(case, piece))


def _cut(case: Case, piece: Piece) -> tuple[Piece, ...]:
    kernel = next(k for k in KERNELS if k.fits(case) and (k.any_band or piece.lower is None))
    if kernel.any_band and kernel is not MATH:
        return (piece,)
    return simple(piece) if piece.lower is None else row_blocks(piece)


def _piece(q: Tensor, k: Tensor, band: tuple[int | None, int | None]) -> Piece:
    return Piece(0, q.shape[2], 0, k.shape[2], *band)


def _choose(case: Case, piece: Piece) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.does(case, piece))
