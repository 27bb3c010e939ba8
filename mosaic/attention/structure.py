"""A mask as structure: whether a query sees a key is computed from vectors, pair by pair.

Documents, padding, a band of positions and boolean programs of the user's are one conjunction, as
a ``TileProgram``. A kernel that computes it for the pairs at hand needs no mask of rows x keys; for
one that cannot, ``tile`` makes that of a piece.

>>> ids, at = torch.tensor([[0, 0, 1]]), positions(((0, 3),), torch.device("cpu"))
>>> found = together([of_documents(ids, ids), of_band(Band(None, 0), at, at)])
>>> found.program
'bool: eq.Tensor(%0, %1); sub.Tensor(%3, %2); le.Scalar(%5, 0); logical_and(%4, %6)'
>>> found.tile(Piece(0, 3, 0, 3)).int()
tensor([[[[1, 0, 0],
          [1, 1, 0],
          [0, 0, 1]]]], dtype=torch.int32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.blocks import Band, Piece
from mosaic.attention.tiles import Ref, Step, TileProgram
from mosaic.layout import Intervals, Run
from mosaic.runtime.comm import take_runs


class Structure(NamedTuple):
    """A ``TileProgram``, and its leaves at a block's queries and keys: vectors (batch|1, heads|1,
    queries|1, keys|1), along one of both at most, tables (entries, heads|1) and numbers ().

    Boolean ones are masks. Others are a bias, or change the scores (``attention/scores.py``).
    """

    program: str
    leaves: tuple[Tensor, ...]

    @property
    def parsed(self) -> TileProgram:
        return TileProgram.parse(self.program)

    def of_piece(self, piece: Piece) -> Structure:
        """For some of the rows and keys alone."""
        rows, keys = (piece.q_start, piece.q_stop), (piece.k_start, piece.k_stop)
        leaves = (part_of(part_of(leaf, 2, *rows), 3, *keys) for leaf in self.leaves)
        return self._replace(leaves=tuple(leaves))

    def tile(self, piece: Piece) -> Tensor:
        """(batch|1, heads|1, rows|1, keys|1), for a kernel that wants a tensor."""
        return self.parsed(*self.of_piece(piece).leaves)

    @property
    def is_of_keys(self) -> bool:
        """Whether all queries and heads see the same keys."""
        return all(leaf.ndim == 0 or leaf.shape[1] == leaf.shape[2] == 1 for leaf in self.leaves)

    def keys(self) -> Tensor:
        """Those that all queries see: boolean (batch|1, 1, 1, keys|1)."""
        return self.parsed(*self.leaves)

    def of_batches(self, some: slice) -> Structure:
        """For these batches alone."""
        leaves = (part_of(leaf, 0, some.start, some.stop) for leaf in self.leaves)
        return self._replace(leaves=tuple(leaves))


def part_of(leaf: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A vector's part along a dim; as it is where it has no more than 1 there, or is none."""
    broadcasts = leaf.ndim < 4 or leaf.shape[dim] == 1
    return leaf if broadcasts else leaf.narrow(dim, start, stop - start)


def of_documents(queries: Tensor, keys: Tensor) -> Structure:
    """Equal ids see each other: int64 (batch|1, queries) and (batch|1, keys)."""
    return Structure("bool: eq.Tensor(%0, %1)", (queries[:, None, :, None], keys[:, None, None, :]))


def of_keys(seen: Tensor) -> Structure:
    """The keys that all queries see: boolean (batch|1, heads|1, 1, keys|1)."""
    return Structure("bool: ne.Scalar(%0, 0)", (seen,))


def of_all(like: Tensor) -> Structure:
    """Every query sees every key."""
    return of_keys(like.new_ones([1, 1, 1, 1], dtype=torch.bool))


def of_band(band: Band, queries: Tensor, keys: Tensor) -> Structure:
    """A band that has a bound, of queries and keys at these positions: int32 (n)."""
    steps = ["sub.Tensor(%1, %0)"]
    steps += [] if band.left is None else [f"ge.Scalar(%2, {-band.left})"]
    steps += [] if band.right is None else [f"le.Scalar(%2, {band.right})"]
    steps += ["logical_and(%3, %4)"] if len(steps) == 3 else []
    leaves = (queries[None, None, :, None], keys[None, None, None, :])
    return Structure(f"bool: {'; '.join(steps)}", leaves)


def positions(intervals: Intervals, device: torch.device) -> Tensor:
    """The global positions of these stretches, in the order of their memory: int32 (n)."""
    end = max((stop for _, stop in intervals), default=0)
    at = torch.arange(end, dtype=torch.int32, device=device)
    return take_runs(at, [Run(*part) for part in intervals], 0)


def together(parts: Sequence[Structure]) -> Structure:
    """What all of them see. (Numbers of steps follow those of all leaves.)"""
    leaves = tuple(leaf for part in parts for leaf in part.leaves)
    steps: list[Step] = []
    last, first_leaf = None, 0
    for part in parts:
        program, count = part.parsed, len(part.leaves)
        moves = first_leaf, len(leaves) + len(steps) - count
        steps += [renumbered(step, count, *moves) for step in program.steps]
        found = Ref(len(leaves) + len(steps) - 1)
        if last is not None:
            steps.append(Step("logical_and", (last, found)))
            found = Ref(found.number + 1)
        last, first_leaf = found, first_leaf + count
    return Structure(str(TileProgram(tuple(steps), torch.bool)), leaves)


def renumbered(step: Step, count: int, by_leaf: int, by_step: int) -> Step:
    """A step of a program with ``count`` leaves, when those and its steps have moved."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Ref):
            return x
        return Ref(x.number + (by_leaf if x.number < count else by_step))

    args = tuple(moved(x) for x in step.args)
    return Step(step.op, args, tuple((name, moved(x)) for name, x in step.kwargs))
