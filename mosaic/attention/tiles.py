"""A dense mask as a program: any tile of it is made from vectors, and the whole never exists.

T5's learned bias is ``table[bucket(key - query)]`` for every pair of positions. What makes it is
small: two vectors of positions and a table. Each rank has those whole, makes the tile of its
queries and the visiting keys, and the tile's gradient goes back to them.

    leaves   a number ()                                        wherever the program has one
             a table (entries, heads|1)                         that is looked up by an index
             a vector (batch|1, heads|1, queries|1, keys|1)     along queries or keys, not both

>>> program = TileProgram.parse("int64: sub.Tensor(%0, %1); abs(%2); neg(%3)")
>>> print(program(torch.arange(3).view(1, 1, 1, 3), torch.arange(2).view(1, 1, 2, 1)))
tensor([[[[ 0, -1, -2],
          [-1,  0, -1]]]])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.layout import Intervals, Run
from mosaic.runtime.comm import take_runs


class Ref(NamedTuple):
    """The result of a step; the leaves come first."""

    number: int

    def __str__(self) -> str:
        return f"%{self.number}"


@dataclass(frozen=True)
class Step:
    """An elementwise op of ATen, or one of ``SPECIAL``, on earlier results."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [str(x) for x in self.args] + [f"{name}={x}" for name, x in self.kwargs]
        return f"{self.op}({', '.join(words)})"

    @classmethod
    def parse(cls, text: str) -> Step:
        op, inside = re.fullmatch(r"([\w.]+)\((.*)\)", text).groups()  # type: ignore[union-attr]
        words = [word.rpartition("=") for word in inside.split(", ") if word]
        args = tuple(_parsed(word) for name, _, word in words if not name)
        return cls(op, args, tuple((name, _parsed(word)) for name, _, word in words if name))

    def __call__(self, known: Sequence[Tensor]) -> Tensor:
        args: list[Any] = [known[x.number] if isinstance(x, Ref) else x for x in self.args]
        if self.op == "filled":
            number, dtype = args
            return torch.full([1, 1, 1, 1], number, dtype=dtype, device=known[0].device)
        if self.op in LOOKUPS:
            return looked_up(self.op, *args)
        name, _, overload = self.op.partition(".")
        return getattr(getattr(torch.ops.aten, name), overload or "default")(
            *args, **dict(self.kwargs)
        )


#: ``index(table, i)`` and ``embedding(table, i, padding_idx)``.
LOOKUPS = ("index", "embedding")
#: What is not a call of ATen's op of that name; ``filled(number, dtype)`` is the same everywhere.
SPECIAL = (*LOOKUPS, "filled")


def looked_up(op: str, table: Tensor, index: Tensor, *padding: int) -> Tensor:
    """(entries, heads|1) at (batch|1, heads|1, s, t), of which one has heads at most."""
    aten = torch.ops.aten
    if op == "index":
        found = aten.index.Tensor(table, [index])
    else:
        found = aten.embedding.default(table, index, *padding)
    return found.squeeze(4) if table.shape[1] == 1 else found.squeeze(1).movedim(3, 1)


def _parsed(word: str) -> Any:
    if word.startswith("%"):
        return Ref(int(word[1:]))
    if word in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[word]
    if word.startswith("torch."):
        return getattr(torch, word.removeprefix("torch."))
    return int(word) if re.fullmatch(r"-?\d+", word) else float(word)


@dataclass(frozen=True)
class TileProgram:
    """``steps``, one after the other; the last one's result is the tile, of this ``dtype``.
    ``learned``: the numbers of the leaves that get a gradient."""

    steps: tuple[Step, ...]
    dtype: torch.dtype
    learned: tuple[int, ...] = ()

    def __str__(self) -> str:
        head = [str(self.dtype).removeprefix("torch."), *(f"d%{i}" for i in self.learned)]
        return f"{' '.join(head)}: {'; '.join(map(str, self.steps))}"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> TileProgram:
        head, _, steps = text.partition(": ")
        dtype, *learned = head.split(" ")
        found = tuple(Step.parse(step) for step in steps.split("; "))
        return TileProgram(found, getattr(torch, dtype), tuple(int(x[2:]) for x in learned))

    def __call__(self, *leaves: Tensor) -> Tensor:
        known = list(leaves)
        for step in self.steps:
            known.append(step(known))
        return known[-1]

    def tile(self, leaves: Sequence[Tensor], rows: Intervals, keys: Intervals) -> Tensor:
        """(batch|1, heads|1, rows, keys) at these global positions."""
        return self(*(part(leaf, rows, keys) for leaf in leaves))

    def gradients(
        self, leaves: Sequence[Tensor], rows: Intervals, keys: Intervals, dtile: Tensor
    ) -> list[Tensor]:
        """What a tile's gradient is for each of the ``learned`` leaves."""

        def tile(*learned: Tensor) -> Tensor:
            given = dict(zip(self.learned, learned, strict=True))
            return self.tile([given.get(i, x) for i, x in enumerate(leaves)], rows, keys)

        made, pull, *_ = torch.func.vjp(tile, *(leaves[i] for i in self.learned))
        return list(pull(dtile.to(made.dtype)))


def part(leaf: Tensor, rows: Intervals, keys: Intervals) -> Tensor:
    """A vector at these queries and keys; numbers and tables as they are."""
    if leaf.ndim < 4:
        return leaf
    for dim, intervals in ((2, rows), (3, keys)):
        if leaf.shape[dim] != 1:
            leaf = take_runs(leaf, [Run(*interval) for interval in intervals], dim)
    return leaf


def of_heads(leaf: Tensor, start: int, stop: int) -> Tensor:
    """A leaf's part for some of the heads."""
    return leaf if leaf.ndim == 0 or leaf.shape[1] == 1 else leaf[:, start:stop]
