"""The local part of every method: this rank's queries against the keys that are here now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.blocks import Piece, pieces
from mosaic.attention.kernels import Gradients
from mosaic.attention.merge import Partial, accumulator, merge, nothing
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.shift import row_shift
from mosaic.layout import Intervals, Layout, Place, Run, Shard
from mosaic.moves import take_runs
from mosaic.random import global_indices, uniform_keep

#: Rows [start, stop) along dim 2, and the tensors that belong to them.
Rows = tuple[int, int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Visit:
    """All that is known of some visiting keys: what is seen of them, their mask, their dropout."""

    pieces: tuple[Piece, ...]
    scale: float
    mask: Tensor | None = None
    shift: Tensor | None = None
    documents: tuple[Tensor, Tensor] | None = None
    keep: Callable[[Piece], Tensor] | None = None

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Piece, ...]:
        """The pieces, cut further for kernels that have no bands."""
        case = kernels.Case.of(q, k, v, self.mask, self.keep is not None)
        if self.documents is not None and self.mask is None:
            case = case._replace(mask=torch.bool)
        return kernels.cut(case, self.pieces)

    def options(self, piece: Piece) -> dict[str, Any]:
        """The keyword arguments of ``kernels.forward`` for one piece."""
        mask = self.mask_of(piece)
        keep = None if self.keep is None else self.keep(piece)
        shift = None if self.shift is None else _tile(self.shift, piece)
        options = {"band": piece.band, "scale": self.scale, "mask": mask}
        return {**options, "keep": keep, "shift": shift}

    def mask_of(self, piece: Piece) -> Tensor | None:
        """(batch|1, heads|1, s|1, t|1): the mask's tile, where documents are the same."""
        mask = None if self.mask is None else _tile(self.mask, piece)
        if self.documents is None:
            return mask
        queries, keys = self.documents
        queries, keys = (
            queries[:, piece.q_start : piece.q_stop],
            keys[:, piece.k_start : piece.k_stop],
        )
        same = (queries[:, :, None] == keys[:, None, :]).unsqueeze(1)
        if mask is None:
            return same
        return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, float("-inf"))


class Inputs(NamedTuple):
    """What an attention has beside q, k and v.

    mask (batch|1, heads|1, seq|1, all keys|1): this rank's rows and every key's column, boolean or
    added to the scores. ``documents``: ids of all queries (batch|1, n) and of all keys, equal ones
    attend. seed: int64 scalar, for dropout.
    """

    mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    seed: Tensor | None = None


def visit(
    plan: AttentionPlan, rows: Intervals, keys: Intervals, q: Tensor, inputs: Inputs
) -> Visit:
    """What the queries at global intervals ``rows`` see of the keys at ``keys``."""
    mask = inputs.mask
    shift = None if mask is None or mask.dtype == torch.bool else row_shift(mask, plan.band, rows)
    if mask is not None and mask.shape[3] != 1:
        mask = take_runs(mask, _runs(keys), 3)
    documents = None
    if inputs.query_documents is not None and inputs.key_documents is not None:
        documents = (
            take_runs(inputs.query_documents, _runs(rows), 1),
            take_runs(inputs.key_documents, _runs(keys), 1),
        )
    keep = _keep(plan, rows, keys, q, inputs.seed) if plan.dropout else None
    seen = pieces(rows, keys, plan.band)
    return Visit(seen, plan.scale, mask, shift, documents, keep)


def _runs(intervals: Intervals) -> list[Run]:
    return [Run(*interval) for interval in intervals]


def _keep(
    plan: AttentionPlan, rows: Intervals, keys: Intervals, q: Tensor, seed: Tensor | None
) -> Callable[[Piece], Tensor]:
    assert seed is not None
    shards = [
        plan.shard_of("batch", q.shape[0]),
        plan.shard_of("heads", q.shape[1]),
        Shard(Place(Layout(plan.query.n, (rows,)), 2), 0, ""),
        Shard(Place(Layout(plan.key.n, (keys,)), 3), 0, ""),
    ]
    batch, heads, row, column = (global_indices(shard, q.device) for shard in shards)

    def keep(piece: Piece) -> Tensor:
        cut = [
            batch,
            heads,
            row[piece.q_start : piece.q_stop],
            column[piece.k_start : piece.k_stop],
        ]
        return uniform_keep(seed, plan.site, cut, plan.dropout, accumulator(q.dtype))

    return keep


def _tile(mask: Tensor, piece: Piece) -> Tensor:
    """A piece's part of a mask (batch|1, heads|1, s|1, t|1)."""
    if mask.shape[2] != 1:
        mask = mask[:, :, piece.q_start : piece.q_stop]
    return mask if mask.shape[3] == 1 else mask[..., piece.k_start : piece.k_stop]


def _queries(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.q_start : piece.q_stop]


def _keys(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.k_start : piece.k_stop]


def attend(q: Tensor, k: Tensor, v: Tensor, visit: Visit, before: Partial | None = None) -> Partial:
    """out and lse of all local rows, merged with what they saw ``before``; at least float32."""
    found: list[Rows] = [(0, q.shape[2], before or nothing(q, v))]
    for piece in visit.parts(q, k, v):
        k_piece, v_piece = _keys(k, piece), _keys(v, piece)
        part = kernels.forward(_queries(q, piece), k_piece, v_piece, **visit.options(piece))
        found.append((piece.q_start, piece.q_stop, part))
    if before is None:
        found = _without_needless(found)
    out, lse = _by_rows(found, merge)
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
) -> Gradients:
    """This visit's dq, dk, dv, and the gradient of ``visit.mask``; in float32 or float64."""
    dtype = accumulator(q.dtype)
    zeros = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
    dq_rows: list[Rows] = [(0, q.shape[2], (zeros[0],))]
    dkv_rows: list[Rows] = [(0, k.shape[2], (zeros[1], zeros[2]))]
    mask = visit.mask if need_dmask else None
    dmask = None if mask is None else torch.zeros_like(mask, dtype=dtype)
    for piece in visit.parts(q, k, v):
        douts, queries, outs, lses = (_queries(x, piece) for x in (dout, q, out, lse))
        options = {**visit.options(piece), "need_dmask": need_dmask}
        keys, values = _keys(k, piece), _keys(v, piece)
        dq, dk, dv, tile = kernels.backward(douts, queries, keys, values, outs, lses, **options)
        dq_rows.append((piece.q_start, piece.q_stop, (dq,)))
        dkv_rows.append((piece.k_start, piece.k_stop, (dk, dv)))
        if dmask is not None and tile is not None:
            dmask = dmask + _spread_tile(tile, dmask, piece)
    (dq,) = _by_rows(_without_needless(dq_rows), _added)
    dk, dv = _by_rows(_without_needless(dkv_rows), _added)
    return dq, dk, dv, dmask


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


def _by_rows(found: list[Rows], combine: Callable) -> tuple[Tensor, ...]:
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
