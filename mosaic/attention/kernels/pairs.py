"""A program as a function of one pair of query and key, as flex kernels take it.

It reads each vector once, at the pair's batch, head, query or key, and each table at the index that
a step has made: those reads are where the gradients of learned leaves are added up. A kernel adds
one pair after the other to a number, and a table has few numbers for very many pairs: so backward
has copies of it (``spread``), neighbours of which are those of neighbouring keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.attention.structure import Structure
from mosaic.attention.tiles import LOOKUPS, Ref, Special, Step

#: How many copies a learned leaf has in backward: the most for which it has at most MOST numbers.
SIDE, COPIES, MOST = 64, (4096, 64), 2**22
#: What a tensor has at these indices.
Read = Callable[[Tensor, list[Tensor]], Tensor]


def plain(x: Tensor, indices: list[Tensor]) -> Tensor:
    return torch.ops.aten.index.Tensor(x, indices)


class Reads(NamedTuple):
    """What a program reads: leaves, and then the table of each step that looks one up. (A kernel
    takes no two reads of one tensor that has a gradient.)"""

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

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.leaves + self.tables


def buffers_of(part: Structure) -> tuple[Tensor, ...]:
    """What the function of a pair takes after the pair: leaves without dims of 1, and tables."""
    learned = part.parsed.learned

    def buffer(number: int) -> Tensor:
        leaf = part.leaves[number]
        return shaped(leaf, number in learned).requires_grad_(number in learned)

    return tuple(buffer(i) for i in Reads.of(part).numbers)


def shaped(leaf: Tensor, is_learned: bool) -> Tensor:
    """As it is read: at an index at least, where it has a gradient."""
    leaf = leaf.detach()
    if leaf.ndim in (2, 3):
        return leaf
    sizes = [leaf.shape[d] for d in varies(leaf)] + list(leaf.shape[-1:]) * is_spread(leaf)
    return leaf.reshape(sizes or [1] * is_learned)


def of_leaves(part: Structure, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of the learned leaves of those of ``buffers_of``."""
    numbers = Reads.of(part).numbers

    def total(number: int) -> Tensor:
        parts = [x for i, x in zip(numbers, grads, strict=True) if i == number and x is not None]
        return torch.stack(parts).sum(0).reshape(part.leaves[number].shape)

    return tuple(total(i) for i in part.parsed.learned)


def exact_leaves(part: Structure) -> Structure:
    """With learned leaves in the dtype in which their gradients are added up."""
    learned = part.parsed.learned
    leaves = (x.to(accumulator(x.dtype)) if i in learned else x for i, x in enumerate(part.leaves))
    return part._replace(leaves=tuple(leaves))


def spread(part: Structure) -> Structure:
    """With copies of each learned leaf as its last dim, unless it is large."""

    def copied(leaf: Tensor) -> Tensor:
        count = next((n for n in COPIES if leaf.numel() * n <= MOST), 1)
        return leaf[..., None].expand(*leaf.shape, count).contiguous() if count > 1 else leaf

    learned = part.parsed.learned
    leaves = (copied(x) if i in learned else x for i, x in enumerate(part.leaves))
    return part._replace(leaves=tuple(leaves))


def is_spread(leaf: Tensor) -> bool:
    """A number has no dim, a table two and a vector four, and the copies are one more."""
    return leaf.ndim % 2 == 1


def varies(leaf: Tensor) -> list[int]:
    """The dims of a vector, of batch, head, query and key, that are not 1."""
    return [d for d, n in enumerate(leaf.shape[:-1] if is_spread(leaf) else leaf.shape) if n > 1]


def copy_of(leaf: Tensor, query: Tensor, key: Tensor) -> list[Tensor]:
    """The index of the copy that a pair reads, if there are copies."""
    if not is_spread(leaf):
        return []
    return [(query % SIDE * SIDE + key % SIDE) % leaf.shape[-1]]


def mask_mod(mask: Structure) -> Callable[..., Tensor]:
    """Whether a query sees a key, of their numbers and the buffers."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor) -> Tensor:
        return at_pair(mask, (batch, head, query, key), buffers, plain)

    return seen


def score_mod(scores: Structure, read: Read) -> Callable[..., Tensor]:
    """What replaces a score, of it, its pair's numbers and the buffers. ``read``: an index whose
    gradient the kernels know."""

    def changed(
        score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor
    ) -> Tensor:
        return at_pair(scores, (batch, head, query, key), buffers, read, score)

    return changed


def at_pair(
    part: Structure, at: tuple[Tensor, ...], buffers: Sequence[Tensor], read: Read, *score: Tensor
) -> Tensor:
    """A program's result at batch, head, query and key."""
    reads, program, leaves = Reads.of(part), part.parsed, part.leaves
    zero, known = at[1] * 0, dict[int, Any]()
    for number, buffer in zip(reads.leaves, buffers, strict=False):
        indices = [at[d] for d in varies(leaves[number])] + copy_of(leaves[number], *at[2:])
        indices = indices or [zero] * (number in program.learned)
        known[number] = read(buffer, indices) if indices else buffer
    heads = (at[1] if leaves[i].shape[1] > 1 else zero for i in reads.tables)
    places = (
        [head, *copy_of(leaves[i], *at[2:])] for i, head in zip(reads.tables, heads, strict=True)
    )
    tables = zip(buffers[len(reads.leaves) :], places, strict=True)
    given = [known.get(i) for i in range(len(leaves))]
    return program(*given, *score, special=of_pairs(tables, read, zero))  # type: ignore[arg-type]


def of_pairs(tables: Iterable[tuple[Tensor, list[Tensor]]], read: Read, zero: Tensor) -> Special:
    """How a pair's steps are done; ``tables``: with the indices after the looked up one, that is
    head and copy, of each lookup after the other."""
    coming = iter(tables)

    def looked_up(step: Step, known: Sequence[Tensor]) -> Tensor:
        table, place = next(coming)
        _, index, *padding = step.given(known)
        found = read(table, [index, *place])
        if not padding or padding[0] < 0:
            return found
        return torch.where(index == padding[0], found.detach(), found)

    def filled(step: Step, known: Sequence[Tensor]) -> Tensor:
        number, dtype = step.args
        return torch.full([], number, dtype=dtype, device=zero.device)

    return {"filled": filled, **dict.fromkeys(LOOKUPS, looked_up)}
