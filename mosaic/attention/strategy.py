"""A method with every number filled in: the one form in which all methods are carried out.

Two levels of grids, and heads in front:

    heads   groups of ranks that exchange sequence for heads first (Ulysses); 1: nobody does
    inter   a grid of nodes, intra: a grid of the ranks of one node. In a grid of rows x cols the
            ranks of a row gather each other's queries, and those of a column each other's keys,
            in ``stages`` portions. Partial outputs go home and are merged.

    method                       heads   inter           intra
    Ring(stages=k)               1       1 x 1           p x 1, k stages
    AllGather                    1       1 x 1           p x 1, 1 stage
    Mesh2D(r, c)                 1       1 x 1           r x c, 1 stage
    Ulysses                      p       1 x 1           1 x 1
    Ulysses, u heads divide      u       1 x 1           p/u x 1, a ring
    Hierarchical(w, "local")     1       p/w x 1, p/w    w x 1, 1 stage
    Hierarchical(w, "ring")      1       p/w x 1, p/w    w x 1, w stages
    Hierarchical(w, "ulysses")   w       p/w x 1, p/w    1 x 1
    Hierarchical(w, "mesh2d")    1       p/w x 1, p/w    r x c = w, 1 stage
    Hierarchical(w, i, "mesh2d") as i    r x c = p/w     as i
    Composed(Ulysses, Ring)      h       1 x 1           s x 1, a ring
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """A grid of ranks (or nodes); keys come down the columns in ``stages`` portions."""

    rows: int = 1
    cols: int = 1
    stages: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Strategy:
    """How one attention is carried out on p = heads x inter.size x intra.size ranks.

    ``is_outer``: the ranks of a head group are not neighbours but as far apart as can be.
    ``everywhere``: queries are whole, and so is the merged output, on every rank (split-KV).
    ``grad_dtype``: in which dK and dV go home ("" is the dtype of K).
    """

    name: str
    heads: int = 1
    is_outer: bool = False
    inter: Level = Level()
    intra: Level = Level()
    everywhere: bool = False
    grad_dtype: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks share the keys; 1 where every rank has all of them."""
        return self.heads * self.inter.size * self.intra.size

    def __str__(self) -> str:
        return self.name

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> Strategy:
        levels = {name: Level(**fields[name]) for name in ("inter", "intra")}
        return cls(**{**fields, **levels})


LOCAL = Strategy("local")
SPLIT_KV = Strategy("split_kv", everywhere=True)
