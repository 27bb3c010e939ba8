"""What is known of keys on a visit: what is seen of them, their mask, their dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.blocks import Piece, pieces, stretch
from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.tiles import TileProgram
from mosaic.layout import Intervals, Layout, Place, Run, Shard
from mosaic.runtime.comm import take_runs
from mosaic.runtime.rng import global_indices, uniform_keep


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
    attend. seed: int64 scalar, for dropout. leaves: those of the plan's ``TileProgram``, all whole,
    in place of a mask.
    """

    mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    seed: Tensor | None = None
    leaves: Sequence[Tensor] = ()


def visit(
    plan: AttentionPlan,
    rows: Intervals,
    keys: Intervals,
    q: Tensor,
    inputs: Inputs,
    shift: Tensor | None = None,
) -> Visit:
    """What the queries at global intervals ``rows`` see of the keys at ``keys``; ``shift`` is
    ``row_shift``'s, over all keys."""
    seen = pieces(rows, keys, plan.band)
    mask = mask_at(plan, rows, keys, inputs) if seen else None
    documents = None
    if inputs.query_documents is not None and inputs.key_documents is not None:
        documents = (
            take_runs(inputs.query_documents, _runs(rows), 1),
            take_runs(inputs.key_documents, _runs(keys), 1),
        )
    keep = _keep(plan, rows, keys, q, inputs.seed) if plan.dropout else None
    return Visit(seen, plan.scale, mask, shift, documents, keep)


def mask_at(plan: AttentionPlan, rows: Intervals, keys: Intervals, inputs: Inputs) -> Tensor | None:
    """The mask's columns of these keys: made now where the plan knows how."""
    if plan.tile:
        return TileProgram.parse(plan.tile).tile(inputs.leaves, rows, keys)
    mask = inputs.mask
    return mask if mask is None or mask.shape[3] == 1 else take_runs(mask, _runs(keys), 3)


def key_blocks(plan: AttentionPlan, keys: Intervals) -> list[tuple[Run, Intervals]]:
    """The keys that are attended to at once: all, or so few that a tile of a mask that is made for
    them is no larger than with a ring. With where they lie in memory."""
    held = sum(interval.length for interval in keys)
    most = -(-plan.key.n // (plan.world or plan.p)) if plan.tile else held
    starts = range(0, held, most) if held else [0]
    runs = [Run(start, min(start + most, held)) for start in starts]
    return [(run, stretch(keys, run.start, run.stop)) for run in runs]


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
