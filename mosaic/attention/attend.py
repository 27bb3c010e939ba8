"""The local part of every method: this rank's queries against the keys that are here now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.blocks import Piece
from mosaic.attention.kernels import Gradients
from mosaic.attention.merge import Partial, accumulator, merge, nothing
from mosaic.attention.scores import unlearned
from mosaic.attention.structure import Structure
from mosaic.attention.visit import Visit

#: Rows [start, stop) along dim 2, and the tensors that belong to them.
Rows = tuple[int, int, tuple[Tensor, ...]]


class VisitGradients(NamedTuple):
    """Of q, k and v, of a mask that is added, and of learned leaves by their numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    leaves: dict[int, Tensor]


def _queries(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.q_start : piece.q_stop]


def _keys(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.k_start : piece.k_stop]


def attend(q: Tensor, k: Tensor, v: Tensor, visit: Visit, before: Partial | None = None) -> Partial:
    """out and lse of all local rows, merged with what they saw ``before``; at least float32."""
    found: list[Rows] = [(0, q.shape[2], before or nothing(q, v))]
    for piece, options in visit.calls(q, k, v):
        k_piece, v_piece = _keys(k, piece), _keys(v, piece)
        part = kernels.forward(_queries(q, piece), k_piece, v_piece, **options)
        found.append((piece.q_start, piece.q_stop, part))
    if before is None:
        found = _without_needless(found)
    out, lse = by_rows(found, merge)
    return out, lse


def _without_needless(found: list[Rows]) -> list[Rows]:
    """Drop the empty first partial where pieces cover every row."""
    covered = 0
    for start, stop, _ in sorted(found[1:], key=lambda rows: rows[:2]):
        covered = max(covered, stop) if start <= covered else covered
    return found[1:] if covered == found[0][1] and len(found) > 1 else found


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visit: Visit,
    need_dmask: bool,
) -> VisitGradients:
    """This visit's dq, dk, dv; with ``need_dmask`` those of ``visit.mask``, where it is added, and
    of its learned leaves, each in its shape here; in float32 or float64."""
    dtype = accumulator(q.dtype)
    zeros = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
    dq_rows: list[Rows] = [(0, q.shape[2], (zeros[0],))]
    dkv_rows: list[Rows] = [(0, k.shape[2], (zeros[1], zeros[2]))]
    mask = visit.mask if need_dmask and visit.adds_mask else None
    dmask = None if mask is None else torch.zeros_like(mask, dtype=dtype)
    dleaves: dict[int, Tensor] = {}
    for piece, options in visit.calls(q, k, v):
        douts, queries, outs, lses = (_queries(x, piece) for x in (dout, q, out, lse))
        options = with_needed(options, need_dmask)
        keys, values = _keys(k, piece), _keys(v, piece)
        grads = kernels.backward(douts, queries, keys, values, outs, lses, **options)
        dq_rows.append((piece.q_start, piece.q_stop, (grads.q,)))
        dkv_rows.append((piece.k_start, piece.k_stop, (grads.k, grads.v)))
        if dmask is not None and grads.mask is not None:
            dmask = dmask + _spread_tile(grads.mask, dmask, piece)
        if need_dmask:
            add_leaves(dleaves, visit, piece, options, grads)
    (dq,) = by_rows(_without_needless(dq_rows), _added)
    dk, dv = by_rows(_without_needless(dkv_rows), _added)
    return VisitGradients(dq, dk, dv, dmask, dleaves)


def with_needed(options: dict[str, Any], need_dmask: bool) -> dict[str, Any]:
    """The options of a call, of which only those have gradients that are needed."""
    mask, scores = options["mask"], options["scores"]
    is_added = isinstance(mask, Tensor) and mask.is_floating_point()
    scores = scores if need_dmask else unlearned(scores)
    return {**options, "scores": scores, "need_dmask": need_dmask and is_added}


def add_leaves(
    found: dict[int, Tensor], visit: Visit, piece: Piece, options: dict[str, Any], grads: Gradients
) -> None:
    """Adds what a piece's gradients are of the visit's leaves."""
    scores: Structure | None = options["scores"]
    parts = [*zip(scores.parsed.learned, grads.leaves, strict=True)] if scores else []
    if visit.bias is not None and grads.mask is not None:
        of_tile = visit.bias.parsed.gradients(visit.bias.of_piece(piece).leaves, grads.mask)
        parts += of_tile.items()
    for number, grad in parts:
        leaf = visit.leaves[number]
        whole = _spread_tile(grad, leaf, piece) if leaf.ndim == 4 else grad
        found[number] = found[number] + whole if number in found else whole


def _added(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(
        _total([x.to(accumulator(x.dtype)) for x in same]) for same in zip(*parts, strict=True)
    )


def _total(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _spread_tile(tile: Tensor, mask: Tensor, piece: Piece) -> Tensor:
    """A piece's mask gradient in the shape of the visit's mask."""
    few = [min(a, b) for a, b in zip(tile.shape, mask.shape, strict=True)]
    rows = (0, 0) if mask.shape[2] == 1 else (piece.q_start, mask.shape[2] - piece.q_stop)
    columns = (0, 0) if mask.shape[3] == 1 else (piece.k_start, mask.shape[3] - piece.k_stop)
    return torch.constant_pad_nd(tile.sum_to_size(few), [*columns, *rows])


def by_rows(found: list[Rows], combine: Callable) -> tuple[Tensor, ...]:
    """Combine what is known of each stretch of rows, and join the stretches along dim 2."""
    cuts = sorted({cut for start, stop, _ in found for cut in (start, stop)})
    stretches = []
    for a, b in list(pairwise(cuts)) or [(0, 0)]:
        here = [(start, x) for start, stop, x in found if start <= a and b <= stop]
        stretches.append(
            combine([tuple(t.narrow(2, a - start, b - a) for t in x) for start, x in here])
        )
    if len(stretches) == 1:
        return stretches[0]
    return tuple(torch.cat(same, 2) for same in zip(*stretches, strict=True))
