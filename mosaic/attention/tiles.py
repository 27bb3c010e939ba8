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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic.attention.lookups import Lookup
from mosaic.attention.merge import accumulator
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

    def __call__(self, known: Sequence[Tensor], special: Special) -> Tensor:
        if self.op in special:
            return special[self.op](self, known)
        args = self.given(known)
        name, _, overload = self.op.partition(".")
        return getattr(getattr(torch.ops.aten, name), overload or "default")(
            *args, **dict(self.kwargs)
        )

    def given(self, known: Sequence[Tensor]) -> list[Any]:
        return [known[x.number] if isinstance(x, Ref) else x for x in self.args]


#: How steps are done that are no call of ATen's op of that name.
Special = Mapping[str, Callable[[Step, Sequence[Tensor]], Tensor]]
#: ``index(table, i)`` and ``embedding(table, i, padding_idx)``.
LOOKUPS = ("index", "embedding")


def filled(step: Step, known: Sequence[Tensor]) -> Tensor:
    """``filled(number, dtype)`` is the same everywhere."""
    number, dtype = step.args
    return torch.full([1, 1, 1, 1], number, dtype=dtype, device=known[0].device)


def looked_up(step: Step, known: Sequence[Tensor]) -> Tensor:
    """(entries, heads|1) at (batch|1, heads|1, s, t), of which one has heads at most."""
    table, index, *padding = step.given(known)
    return Lookup.apply(table, index, *(padding or [-1]))


#: Of a whole tile.
OF_TILES: Special = {"filled": filled, **dict.fromkeys(LOOKUPS, looked_up)}


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
    ``learned``: the numbers of the leaves that get a gradient. ``mild``: no finite number of it is
    so low that it hides a key, as ``finfo.min`` does."""

    steps: tuple[Step, ...]
    dtype: torch.dtype
    learned: tuple[int, ...] = ()
    mild: bool = False

    def __str__(self) -> str:
        head = [str(self.dtype).removeprefix("torch."), *(f"d%{i}" for i in self.learned)]
        head += ["mild"] if self.mild else []
        return f"{' '.join(head)}: {'; '.join(map(str, self.steps))}"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> TileProgram:
        head, _, steps = text.partition(": ")
        dtype, *facts = head.split(" ")
        found = tuple(Step.parse(step) for step in steps.split("; "))
        learned = tuple(int(x[2:]) for x in facts if x.startswith("d%"))
        return TileProgram(found, getattr(torch, dtype), learned, "mild" in facts)

    def __call__(self, *leaves: Tensor, special: Special = OF_TILES) -> Tensor:
        known = list(leaves)
        for step in self.steps:
            known.append(step(known, special))
        return known[-1]

    @property
    def has_tables(self) -> bool:
        """Whether it looks something up for each pair, or gives what it reads a gradient."""
        return bool(self.learned) or any(step.op in LOOKUPS for step in self.steps)

    @property
    def softcap(self) -> float:
        """c of c * tanh(score), if that is all that is done; else 0."""
        ops = [step.op for step in self.steps]
        return float(self.steps[1].args[1]) if ops == ["tanh", "mul.Tensor"] else 0.0

    def gradients(self, leaves: Sequence[Tensor], dtile: Tensor) -> dict[int, Tensor]:
        """What a tile's gradient is for each of the ``learned`` leaves, by their numbers."""

        def tile(*learned: Tensor) -> Tensor:
            given = dict(zip(self.learned, learned, strict=True))
            return self(*(given.get(i, x) for i, x in enumerate(leaves)))

        exact = (leaves[i].to(accumulator(leaves[i].dtype)) for i in self.learned)
        made, pull, *_ = torch.func.vjp(tile, *exact)
        return dict(
            zip(self.learned, pull(dtile.sum_to_size(made.shape).to(made.dtype)), strict=True)
        )


def adds_bias(tile: str) -> bool:
    """Whether the program of a mask, if there is one, makes what is added to the scores."""
    return bool(tile) and TileProgram.parse(tile).dtype != torch.bool


def part(leaf: Tensor, rows: Intervals, keys: Intervals) -> Tensor:
    """A vector at these queries and keys; numbers and tables as they are."""
    if leaf.ndim < 4:
        return leaf
    for dim, intervals in ((2, rows), (3, keys)):
        if leaf.shape[dim] != 1:
            leaf = take_runs(leaf, [Run(*interval) for interval in intervals], dim)
    return leaf


def of_part(grad: Tensor, leaf: Tensor, rows: Intervals, keys: Intervals) -> Tensor:
    """The gradient of a leaf of that of its ``part``."""
    if leaf.ndim < 4 or leaf.shape[2] == leaf.shape[3] == 1:
        return grad
    _, pull, *_ = torch.func.vjp(lambda x: part(x, rows, keys), leaf.to(grad.dtype))
    return pull(grad)[0]


def of_heads(leaf: Tensor, start: int, stop: int) -> Tensor:
    """A leaf's part for some of the heads."""
    return leaf if leaf.ndim == 0 or leaf.shape[1] == 1 else leaf[:, start:stop]
