"""Where a sharded axis sits in a tensor, and one rank's side of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from mosaic.layout.intervals import placed
from mosaic.layout.layout import Layout


@dataclass(frozen=True)
class Place:
    """Where a sharded axis sits in a tensor: dim ``dim`` has size outer x layout.n x inner."""

    layout: Layout
    dim: int
    outer: int = 1
    inner: int = 1
    mesh_axis: str = "sp"

    @property
    def size(self) -> int:
        return self.outer * self.layout.n * self.inner

    def local_size(self, rank: int) -> int:
        return self.outer * self.layout.lengths[rank] * self.inner

    def local_shape(self, shape: Sequence[int], rank: int) -> list[int]:
        return [self.local_size(rank) if d == self.dim else s for d, s in enumerate(shape)]

    def at(self, dim: int) -> Place:
        return replace(self, dim=dim)

    def with_layout(self, layout: Layout) -> Place:
        return replace(self, layout=layout)

    def refined(self) -> Place:
        """Read rows of ``inner`` elements as a longer axis; possible when nothing is outside."""
        if self.outer != 1 or self.inner == 1:
            return self
        return replace(self, layout=self.layout.scale(self.inner), inner=1)

    def coarsened(self) -> Place:
        """Undo ``refined``: the longest rows that no rank's interval tears. Not a single one for
        all: that could be read into any dim."""
        n = self.layout.n
        k = gcd(n, *(bound for r in self.layout.ranks for i in r for bound in i))
        coarse = self.layout.coarsen(k) if 1 < k < n else None
        return replace(self, layout=coarse, inner=self.inner * k) if coarse else self

    def __str__(self) -> str:
        block = (
            f" outer={self.outer} inner={self.inner}" if (self.outer, self.inner) != (1, 1) else ""
        )
        return f"{self.layout} dim={self.dim}{block}"


@dataclass(frozen=True)
class Shard:
    """One rank's side of a place, written into graphs as a string: all that a collective needs."""

    place: Place
    rank: int
    group: str

    def encode(self) -> str:
        p = self.place
        return f"{p.layout} {p.dim} {p.outer} {p.inner} {p.mesh_axis} {self.rank} {self.group}"

    @classmethod
    def decode(cls, text: str) -> Shard:
        layout, dim, outer, inner, mesh_axis, rank, group = text.split(" ")
        place = Place(Layout.parse(layout), int(dim), int(outer), int(inner), mesh_axis)
        return cls(place, int(rank), group)


def held_rows_of(shard: Shard) -> list[tuple[int, int, int]]:
    """(start, stop, where it begins in this rank's memory) of every interval of the whole dim."""
    place = shard.place
    held = place.layout.blocks(place.outer, place.inner).ranks[shard.rank]
    return [(*interval, run.start) for interval, run in placed(held)]
