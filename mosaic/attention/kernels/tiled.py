"""On CUDA a bias that is looked up, or learned: tile by tile, each of a few rows and all keys.

T5's bias is a table's entry for each pair. flex kernels look it up, and add to its gradient, pair
by pair, which is slow; a tile of it is quick to make, and ATen's memory-efficient kernel adds it to
the scores and gives its gradient. One op goes over the tiles, so that neither a graph nor a rank
has a tensor of rows x keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.blocks import Piece
from mosaic.attention.kernels.efficient import EFFICIENT
from mosaic.attention.kernels.flex import arguments_of
from mosaic.attention.kernels.kernel import MOST_BATCHES, TABLES, Case, Gradients, Kernel
from mosaic.attention.kernels.math import MATH
from mosaic.attention.merge import Partial, accumulator, unwritten
from mosaic.attention.scores import bias_of
from mosaic.attention.structure import Structure, part_of
from mosaic.attention.tiles import TileProgram
from mosaic.torch_private import recording

#: The most numbers of a tile, of all batches and heads: 128 MiB of 16 bits.
MOST = 2**26


class Tile(NamedTuple):
    """Some rows and all keys; the kernel that does them, and with what options."""

    piece: Piece
    kernel: Kernel
    options: dict[str, Any]
    bias: Structure | None

    def rows(self, x: Tensor) -> Tensor:
        return x[:, :, self.piece.q_start : self.piece.q_stop]


def tiles(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Structure, scores: Structure, scale: float
) -> Iterator[Tile]:
    """Those of q, k and v."""
    batch, heads, s, _ = tensors[0].shape
    t = tensors[1].shape[2]
    step = max(1, min(s, MOST // (batch * heads * t)))
    for start in range(0, s, step):
        piece = Piece(start, min(start + step, s), 0, t)
        yield tile(tensors, piece, mask, scores, scale)


def tile(
    tensors: tuple[Tensor, Tensor, Tensor],
    piece: Piece,
    mask: Structure,
    scores: Structure,
    scale: float,
) -> Tile:
    seen, options = mask.tile(piece), {"band": piece.band, "scale": scale, "keep": None}
    found = bias_of(scores)
    if found is None:
        options |= {"mask": seen, "shift": None, "scores": scores.of_piece(piece)}
        return Tile(piece, MATH, options, None)
    bias, shift = found
    added = bias.tile(piece).masked_fill(~seen, float("-inf"))
    shift = None if shift is None else part_of(shift, 2, piece.q_start, piece.q_stop)
    options |= {"mask": added, "shift": shift}
    fits = EFFICIENT.fits(Case.of(*tensors, added, False))
    return Tile(piece, EFFICIENT if fits else MATH, options, bias)


@torch.library.custom_op(
    "mosaic::tiles",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] leaves, str program, Tensor[] score_leaves, "
    "str scores, float scale) -> (Tensor, Tensor)",
)
def tiles_op(q, k, v, leaves, program, score_leaves, scores, scale):
    """out and lse of the pairs that a structure sees, whose scores a program changes."""
    structures = Structure(program, tuple(leaves)), Structure(scores, tuple(score_leaves))
    found = [
        one.kernel.forward(one.rows(q), k, v, **one.options)
        for one in tiles((q, k, v), *structures, scale)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


@tiles_op.register_fake
def _(q, k, v, *rest):
    return unwritten(q, v)


@torch.library.custom_op(
    "mosaic::tiles_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] leaves, "
    "str program, Tensor[] score_leaves, str scores, float scale) -> Tensor[]",
)
def tiles_backward_op(dout, q, k, v, out, lse, leaves, program, score_leaves, scores, scale):
    """dq, dk and dv, each shaped like its input, and those of the scores' learned leaves."""
    structures = Structure(program, tuple(leaves)), Structure(scores, tuple(score_leaves))
    learned = TileProgram.parse(scores).learned
    dqs = []
    whole = [k, v, *(score_leaves[i] for i in learned)]
    totals = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in whole]
    for one in tiles((q, k, v), *structures, scale):
        inputs = (one.rows(dout), one.rows(q), k, v, one.rows(out), one.rows(lse))
        grads = one.kernel.backward(*inputs, **one.options, need_dmask=bool(learned and one.bias))
        dqs.append(grads.q)
        dleaves = grads.leaves if one.bias is None else of_bias(one, grads.mask)
        dleaves = [
            of_rows(x, one.piece, total) for x, total in zip(dleaves, totals[2:], strict=True)
        ]
        for total, grad in zip(totals, (grads.k, grads.v, *dleaves), strict=True):
            total += grad
    return [torch.cat(dqs, 2).to(accumulator(q.dtype)), *totals]


@tiles_backward_op.register_fake
def _(dout, q, k, v, out, lse, leaves, program, score_leaves, scores, scale):
    learned = TileProgram.parse(scores).learned
    whole = [q, k, v, *(score_leaves[i] for i in learned)]
    return [x.new_empty(x.shape, dtype=accumulator(x.dtype)) for x in whole]


def of_bias(one: Tile, dbias: Tensor | None) -> list[Tensor]:
    """The gradients of the learned leaves of a tile's."""
    assert one.bias is not None
    if dbias is None:
        return []
    with recording():
        leaves = [x.detach() for x in one.bias.of_piece(one.piece).leaves]
        return [*one.bias.parsed.gradients(leaves, dbias.detach()).values()]


def of_rows(grad: Tensor, piece: Piece, whole: Tensor) -> Tensor:
    """As large as the whole: what has rows has those of the piece alone."""
    if grad.shape == whole.shape:
        return grad
    return F.pad(grad, (0, 0, piece.q_start, whole.shape[2] - piece.q_stop))


def _forward(q, k, v, *, mask, scale, scores, **_) -> Partial:
    out, lse = torch.ops.mosaic.tiles(q, k, v, *arguments_of(mask, scores, scale))
    return out, lse


def _backward(dout, q, k, v, out, lse, *, mask, scale, scores, **_) -> Gradients:
    rest = arguments_of(mask, scores, scale)
    dq, dk, dv, *dleaves = torch.ops.mosaic.tiles_backward(dout, q, k, v, out, lse, *rest)
    return Gradients(dq, dk, dv, None, tuple(dleaves))


def _fits(case: Case) -> bool:
    able = case.device == "cuda" and case.is_structured and case.scores == TABLES
    return able and not (case.dropout or case.empty)


#: A band is in the structure.
TILES = Kernel("tiles", _fits, "none", _forward, _backward, MOST_BATCHES)
