"""One block of attention: some queries, some keys, and the table of kernels that can do it.

Forward gives the log-sum-exp beside the output; backward takes the *global* output and
log-sum-exp, so that the gradients of blocks add up to the whole one's.

    q (batch, heads, s, d)   k (batch, kv_heads, t, d)   v (batch, kv_heads, t, e)
    out (batch, heads, s, e)   lse (batch, heads, s), natural log, float32 (float64 for float64)

``band`` is (lower, upper): row i sees key j where lower <= j - i <= upper, None is unbounded.
``mask`` is (batch|1, heads|1, s|1, t|1), boolean (True attends) or added to the scores; or a
``Structure``, where a kernel ``takes`` it. ``scores`` changes the scaled scores before that
(``attention/scores.py``), where a kernel does that.
``keep`` is a dropout mask, 0 or 1 / (1 - p). ``shift`` (batch|1, heads|1, s|1, 1) is taken off
every score of a row, of all blocks alike. A row that sees no key has out 0, lse -inf and no
gradient.

Which kernel does a block depends on shapes, dtypes, the device and the band, never on values, so
that every choice is made when a graph is traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention.blocks import Piece, row_blocks, simple
from mosaic.attention.kernels import batches
from mosaic.attention.kernels.aten import CPU_FLASH, CUDNN, FLASH
from mosaic.attention.kernels.efficient import EFFICIENT
from mosaic.attention.kernels.flash_attn import FLASH_ATTN_4
from mosaic.attention.kernels.flash_masks import FLASH_MASKS
from mosaic.attention.kernels.flex import FLEX
from mosaic.attention.kernels.kernel import STRUCTURE, Bounds, Case, Gradients, Kernel
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.measured import BACKWARD, BOTH, FORWARD, quickest
from mosaic.attention.kernels.seen_first import SEEN_FIRST
from mosaic.attention.kernels.short import SHORT, SHORT_SINGLE
from mosaic.attention.kernels.tiled import TILES
from mosaic.attention.merge import Partial
from mosaic.attention.structure import Structure

__all__ = ["KERNELS", "Case", "Gradients", "backward", "cut", "forward", "takes", "using"]

#: Which kernel does a block: of those that fit, the one that took least where it was ``measured``;
#: the first, where none was. ``MATH`` is right for every mask that is a tensor, and alone does
#: dropout and blocks without rows or keys; ``FLEX``, ``TILES`` and it alone change scores.
KERNELS: tuple[Kernel, ...] = (
    #              device  dtypes        head dims  masks          bands
    SHORT,  #        cuda  16 bits       ... 64     keys           any       128 tokens at most
    SHORT_SINGLE,  # cuda  32 bits       ... 64     keys           any       32 tokens at most
    FLASH_ATTN_4,  # cuda  16 bits       ... 256    none           any       Hopper, Blackwell
    CUDNN,  #        cuda  16 bits       ... 128    none           square    Hopper and later
    FLASH,  #        cuda  16 bits       ... 256    none           any       Ampere and later
    SEEN_FIRST,  #   cuda  16 bits       ... 256    keys           none      Hopper, as 4
    FLASH_MASKS,  #  cuda  16 bits       16 ... 128 structure      in its mask   Hopper, as 4
    FLEX,  #         cuda  16, 32 bits   16 ... 256 structure      in its mask   Ampere and later
    TILES,  #        cuda  any           any        structure      in its mask   tables
    EFFICIENT,  #    cuda  16, 32 bits   any        bool, float    any, as a bias
    CPU_FLASH,  #    cpu   any           equal      none           square
    MATH,  #         any   any           any        bool, float    any, as scores
)

_only: ContextVar[str] = ContextVar("only", default="")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Only the kernel of this name, to measure it; for this thread. What it cannot do is an
    UnsupportedError."""
    token = _only.set(name)
    try:
        yield
    finally:
        _only.reset(token)


def _table() -> tuple[Kernel, ...]:
    only = _only.get()
    return tuple(kernel for kernel in KERNELS if kernel.name == only) if only else KERNELS


def forward(
    q,
    k,
    v,
    *,
    band: Bounds,
    mask: Tensor | Structure | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
    scores: Structure | None = None,
) -> Partial:
    """out and lse of one block."""
    factor, scale = _above_zero(scale)
    options = {"band": band, "mask": mask, "scale": scale, "keep": keep, "shift": shift}
    q, k, v = (_in_rows(x) for x in (_times(q, factor), k, v))
    case = Case.of(q, k, v, mask, keep is not None, scores)
    kernel = _choose(case, _piece(q, k, band), FORWARD)
    return batches.forward(kernel, q, k, v, **options, scores=scores)


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    band: Bounds,
    mask: Tensor | Structure | None,
    scale: float,
    keep: Tensor | None,
    shift: Tensor | None = None,
    scores: Structure | None = None,
    need_dmask: bool = False,
) -> Gradients:
    """This block's part of dq, dk, dv (and of the mask's gradient, in the mask's shape, and of
    those of the scores' learned leaves)."""
    factor, scale = _above_zero(scale)
    options = {"band": band, "mask": mask, "scale": scale, "keep": keep, "shift": shift}
    q = _times(q, factor)
    case = Case.of(q, k, v, mask, keep is not None, scores)
    kernel = _choose(case, _piece(q, k, band), BACKWARD)
    tensors = (*(_in_rows(x) for x in (dout, q, k, v, out)), lse)
    grads = batches.backward(kernel, tensors, **options, scores=scores, need_dmask=need_dmask)
    return grads._replace(q=_times(grads.q, factor))


def _above_zero(scale: float) -> tuple[float, float]:
    """(factor of the queries, scale). Kernels look for a row's largest score before they scale, and
    scale the -inf of a key that is not seen: right for what is above zero."""
    if scale > 0:
        return 1.0, scale
    return (0.0, 1.0) if scale == 0 else (-1.0, -scale)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _in_rows(x: Tensor) -> Tensor:
    """With head dims that lie side by side: some kernels read them so without a look at strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def takes(case: Case, piece: Piece) -> bool:
    """Whether a kernel does a block as it is, whose mask is a ``Structure``."""
    return any(kernel.does(case, piece) for kernel in _table())


def is_quicker_at_once(case: Case, pieces: tuple[Piece, ...]) -> bool:
    """Whether bands without another mask are done quicker as a structure of positions, by flex,
    than by a kernel that knows bands."""
    bounded = [piece for piece in pieces if piece.band != (None, None)]
    if not bounded or not case.plain or not FLEX.fits(case._replace(mask=STRUCTURE)):
        return False
    largest = max(bounded, key=lambda piece: piece.area)
    able = [kernel for kernel in _table() if kernel.does(case, largest)]
    return FLEX in _table() and quickest([*able, FLEX], case, largest, BOTH) is FLEX


def caps(case: Case, pieces: tuple[Piece, ...]) -> bool:
    """Whether a kernel that knows bands also caps the scores."""
    can = FLASH_ATTN_4 in _table() and case.capped
    return can and all(FLASH_ATTN_4.does(case, piece) for piece in pieces)


def cut(case: Case, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces of a block, as the kernels that will do them want them: whole for a kernel that
    knows bands; rectangles and triangles; or, with neither, blocks of rows."""
    return tuple(part for piece in pieces for part in _cut(case, piece))


def _cut(case: Case, piece: Piece) -> tuple[Piece, ...]:
    can = (
        kernel
        for kernel in _table()
        if kernel.fits(case)
        and not kernel.is_short_of(piece)
        and (kernel.bands != "square" or piece.lower is None)
    )
    if next(can, MATH).is_whole(piece):
        return (piece,)
    return simple(piece) if piece.lower is None else row_blocks(piece)


def _piece(q: Tensor, k: Tensor, band: Bounds) -> Piece:
    return Piece(0, q.shape[2], 0, k.shape[2], *band)


def _choose(case: Case, piece: Piece, way: slice) -> Kernel:
    able = [kernel for kernel in _table() if kernel.does(case, piece)]
    if not able:
        names = ", ".join(kernel.name for kernel in _table()) or "no kernel"
        raise UnsupportedError(
            f"{names} cannot do this block",
            case=case,
            piece=piece,
            fix="leave mosaic.attention.kernels' table as it is: its last kernel does every block",
        )
    return quickest(able, case, piece, way)
