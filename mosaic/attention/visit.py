"""What is known of keys on a visit: what is seen of them, their mask, their dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.blocks import FULL, Band, Piece, pieces, sees_any, stretch
from mosaic.attention.kernels.kernel import STRUCTURE, change_of
from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.scores import then, with_bias
from mosaic.attention.structure import (
    Structure,
    of_all,
    of_band,
    of_documents,
    of_keys,
    positions,
    together,
)
from mosaic.attention.tiles import part
from mosaic.layout import Intervals, Layout, Place, Run, Shard
from mosaic.runtime.comm import take_runs
from mosaic.runtime.rng import global_indices, uniform_keep


@dataclass(frozen=True)
class Visit:
    """All that is known of some visiting keys: what is seen of them, their mask, their dropout.

    ``seen`` is what of the mask is structure, ``bias`` a float program that is added to the scores,
    and ``mask`` the rest. ``scores``: what changes the scores before. ``pieces`` of the queries at
    ``rows`` and the keys at ``keys`` have the band, ``bounds``, in them; ``band`` makes its
    structure, if it has a bound.
    """

    rows: Intervals
    keys: Intervals
    bounds: Band
    scale: float
    mask: Tensor | None = None
    shift: Tensor | None = None
    seen: Structure | None = None
    band: Callable[[], Structure] | None = None
    keep: Callable[[Piece], Tensor] | None = None
    bias: Structure | None = None
    scores: Structure | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What is seen, by the band; of many intervals they are slow to find."""
        return pieces(self.rows, self.keys, self.bounds)

    @property
    def is_empty(self) -> bool:
        return not sees_any(self.rows, self.keys, self.bounds)

    @property
    def is_structure(self) -> bool:
        """Whether there is more than a band, and a kernel may compute all of it pair by pair."""
        rest = (self.seen, self.bias, self.scores)
        return self.mask is None and any(part is not None for part in rest)

    @property
    def adds_mask(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Of its programs that may have learned some."""
        program = self.bias or self.scores
        return program.leaves if program else ()

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Piece, dict[str, Any]]]:
        """The calls of ``kernels.forward`` that do it all: the piece of each, and its options."""
        case = kernels.Case.of(q, k, v, self.mask, self.keep is not None, self.scores)
        if self.is_structure and not self.is_empty and not self.is_capped(case):
            piece, options = self.at_once(q, k)
            given = (options["mask"], self.keep is not None, options["scores"])
            if kernels.takes(kernels.Case.of(q, k, v, *given), piece):
                yield piece, options
                return
        elif self.band is not None and kernels.is_quicker_at_once(case, self.pieces):
            yield self.at_once(q, k)
            return
        for piece in kernels.cut(case._replace(mask=self.dtype), self.pieces):
            yield piece, self.options(piece)

    def is_capped(self, case: kernels.Case) -> bool:
        """Whether a kernel is told of the band and the softcap, and there is nothing else."""
        rest = (self.mask, self.seen, self.bias)
        return all(part is None for part in rest) and kernels.caps(case, self.pieces)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a piece's mask that is a tensor."""
        if self.mask is not None:
            return self.mask.dtype
        if self.bias is not None:
            return self.bias.parsed.dtype
        return None if self.seen is None else torch.bool

    def at_once(self, q: Tensor, k: Tensor) -> tuple[Piece, dict[str, Any]]:
        """All rows and keys, with the band in the mask: a kernel leaves out what is not seen."""
        band = None if self.band is None else self.band()
        parts = [part for part in (self.seen, band) if part is not None]
        mask = together(parts) if parts else of_all(q)
        whole = Piece(0, q.shape[2], 0, k.shape[2])
        options = {"band": whole.band, "scale": self.scale, "mask": mask}
        scores = self.scores if self.bias is None else with_bias(self.scores, self.bias)
        if scores is not None and self.shift is not None:
            scores = then(scores, "sub.Tensor", self.shift)
        return whole, {**options, "keep": None, "shift": None, "scores": scores}

    def options(self, piece: Piece) -> dict[str, Any]:
        """The keyword arguments of ``kernels.forward`` for one piece, with a mask of its size."""
        mask = self.mask_of(piece)
        keep = None if self.keep is None else self.keep(piece)
        shift = None if self.shift is None else _tile(self.shift, piece)
        scores = None if self.scores is None else self.scores.of_piece(piece)
        options = {"band": piece.band, "scale": self.scale, "mask": mask}
        return {**options, "keep": keep, "shift": shift, "scores": scores}

    def mask_of(self, piece: Piece) -> Tensor | None:
        """(batch|1, heads|1, s|1, t|1): the mask's tile, where the structure sees a pair."""
        mask = None if self.mask is None else _tile(self.mask, piece)
        mask = mask if self.bias is None else self.bias.tile(piece)
        if self.seen is None:
            return mask
        seen = self.seen.tile(piece)
        if mask is None:
            return seen
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


class Inputs(NamedTuple):
    """What an attention has beside q, k and v.

    mask (batch|1, heads|1, seq|1, all keys|1): this rank's rows and every key's column, boolean or
    added to the scores. ``documents``: ids of all queries (batch|1, n) and of all keys, equal ones
    attend. seed: int64 scalar, for dropout. leaves: those of the plan's programs, all whole. sinks
    (heads): the score of a key of value 0 that all queries see.
    """

    mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    seed: Tensor | None = None
    leaves: Sequence[Tensor] = ()
    sinks: Tensor | None = None


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
    where = rows, keys, plan.band
    if not sees_any(*where):
        return Visit(*where, plan.scale, shift=shift)
    leaves = tuple(part(leaf, rows, keys) for leaf in inputs.leaves)
    structure, mask = structure_at(plan, rows, keys, inputs, leaves), None
    if inputs.mask is not None and not is_of_keys(inputs.mask):
        mask = columns(inputs.mask, keys)
    bias = Structure(plan.tile, leaves) if plan.has_bias else None
    scores = Structure(plan.scores, leaves) if plan.scores else None
    band = None if plan.band == FULL else partial(_band, plan.band, rows, keys, q.device)
    keep = _keep(plan, rows, keys, q, inputs.seed) if plan.dropout else None
    return Visit(*where, plan.scale, mask, shift, structure, band, keep, bias, scores)


def _band(band: Band, rows: Intervals, keys: Intervals, device: torch.device) -> Structure:
    return of_band(band, positions(rows, device), positions(keys, device))


def is_in_kernel(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a kernel computes a plan's programs pair by pair: then no tile is made."""
    changes = change_of(plan.scores, plan.tile if plan.has_bias else "")
    case = kernels.Case.of(q, k, v, None, bool(plan.dropout))
    case = case._replace(mask=STRUCTURE, scores=changes)
    return kernels.takes(case, Piece(0, q.shape[2], 0, k.shape[2]))


def is_of_keys(mask: Tensor) -> bool:
    """Whether a mask says of each key, to all queries, that it is seen."""
    return mask.dtype == torch.bool and mask.shape[2] == 1


def structure_at(
    plan: AttentionPlan,
    rows: Intervals,
    keys: Intervals,
    inputs: Inputs,
    leaves: tuple[Tensor, ...],
) -> Structure | None:
    """What is seen of these keys, but for the band; None where nothing more is said. ``leaves``:
    those of the plan's programs here."""
    found = []
    if inputs.query_documents is not None and inputs.key_documents is not None:
        queries = take_runs(inputs.query_documents, _runs(rows), 1)
        found.append(of_documents(queries, take_runs(inputs.key_documents, _runs(keys), 1)))
    if plan.tile and not plan.has_bias:
        found.append(Structure(plan.tile, leaves))
    if inputs.mask is not None and is_of_keys(inputs.mask):
        found.append(of_keys(columns(inputs.mask, keys)))
    return together(found) if found else None


def columns(mask: Tensor, keys: Intervals) -> Tensor:
    """Those of these keys, or the one of all."""
    return mask if mask.shape[3] == 1 else take_runs(mask, _runs(keys), 3)


def key_blocks(
    plan: AttentionPlan, keys: Intervals, has_tiles: bool
) -> list[tuple[Run, Intervals]]:
    """The keys that are attended to at once: all, or so few that a tile of a mask that is made for
    them is no larger than with a ring. With where they lie in memory."""
    held = sum(interval.length for interval in keys)
    most = -(-plan.key.n // (plan.world or plan.p)) if has_tiles else held
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
