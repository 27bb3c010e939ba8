"""A program as a function of one pair of query and key, as flex kernels take it.

It reads each vector once, at the pair's batch, head, query or key, and each table at the index that
a step has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.structure import Structure
from mosaic.attention.tiles import LOOKUPS, Ref, Special, Step


class Reads(NamedTuple):
    """What a program reads: leaves, and then the table of each step that looks one up."""

    leaves: tuple[int, ...]
    tables: tuple[int, ...]

    @classmethod
    def of(cls, part: Structure) -> Reads:
        steps, count = part.parsed.steps, len(part.leaves)
        given = [x for step in steps for x in step.args[int(step.op in LOOKUPS) :]]
        given += [x for step in steps for _, x in step.kwargs]
        leaves = {x.number for x in given if isinstance(x, Ref) and x.number < count}
        tables = (step.args[0].number for step in steps if step.op in LOOKUPS)
        return cls(tuple(sorted(leaves)), tuple(tables))


def buffers_of(part: Structure) -> tuple[Tensor, ...]:
    """What the function of a pair takes after the pair: leaves without dims of 1, and tables."""
    reads = Reads.of(part)
    leaves = (part.leaves[i].detach() for i in reads.leaves + reads.tables)
    return tuple(leaf if leaf.ndim == 2 else leaf.squeeze() for leaf in leaves)


def mask_mod(mask: Structure) -> Callable[..., Tensor]:
    """Whether a query sees a key, of their numbers and the buffers."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor) -> Tensor:
        return at_pair(mask, (batch, head, query, key), buffers)

    return seen


def score_mod(scores: Structure) -> Callable[..., Tensor]:
    """What replaces a score, of it, its pair's numbers and the buffers."""

    def changed(
        score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor
    ) -> Tensor:
        return at_pair(scores, (batch, head, query, key), buffers, score)

    return changed


def at_pair(
    part: Structure, at: tuple[Tensor, ...], buffers: Sequence[Tensor], *score: Tensor
) -> Tensor:
    """A program's result at batch, head, query and key."""
    reads, leaves, zero = Reads.of(part), part.leaves, at[1] * 0
    known = dict[int, Any]()
    for number, buffer in zip(reads.leaves, buffers, strict=False):
        places = [at[d] for d, n in enumerate(leaves[number].shape) if n > 1]
        known[number] = torch.ops.aten.index.Tensor(buffer, places) if places else buffer
    heads = (at[1] if leaves[i].shape[1] > 1 else zero for i in reads.tables)
    tables = zip(buffers[len(reads.leaves) :], heads, strict=True)
    given = [known.get(i) for i in range(len(leaves))]
    return part.parsed(*given, *score, special=of_pairs(tables, zero))  # type: ignore[arg-type]


def of_pairs(tables: Iterable[tuple[Tensor, Tensor]], zero: Tensor) -> Special:
    """How a pair's steps are done; ``tables``: with the head, of each lookup after the other."""
    coming = iter(tables)

    def looked_up(step: Step, known: Sequence[Tensor]) -> Tensor:
        table, head = next(coming)
        return torch.ops.aten.index.Tensor(table, [step.given(known)[1], head])

    def filled(step: Step, known: Sequence[Tensor]) -> Tensor:
        number, dtype = step.args
        return torch.full([], number, dtype=dtype, device=zero.device)

    return {"filled": filled, **dict.fromkeys(LOOKUPS, looked_up)}
