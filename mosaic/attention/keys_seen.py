"""Which keys blocks of queries may see, of a mask that is known when a program is compiled.

Fixed blocks (Llama 4's chunked attention), prefixes and patterns of positions say it, and then no
rank is sent keys that its queries do not see. Where documents begin is data, mostly: not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mosaic.layout import Interval, Intervals, Layout, united


@dataclass(frozen=True)
class KeysSeen:
    """Of ``keys`` keys those that at least one query of each block of ``block`` sees, or more."""

    block: int
    keys: int
    blocks: tuple[Intervals, ...]

    def of(self, queries: Intervals) -> Intervals:
        """What these queries may see, in ascending order."""
        numbers = {
            number
            for start, stop in queries
            if start < stop
            for number in range(start // self.block, (stop - 1) // self.block + 1)
        }
        return united(interval for number in sorted(numbers) for interval in self.blocks[number])

    def layout(self, query: Layout) -> Layout:
        """Of each rank's queries."""
        return Layout(self.keys, tuple(self.of(held) for held in query.ranks))

    def pairs(self, queries: Intervals) -> int:
        """How many pairs of a query and a key there may be."""
        each = [sum(interval.length for interval in seen) for seen in self.blocks]
        return sum(
            each[number] * (min(stop, (number + 1) * self.block) - max(start, number * self.block))
            for start, stop in queries
            if start < stop
            for number in range(start // self.block, (stop - 1) // self.block + 1)
        )


def in_blocks(rows: Sequence[Sequence[tuple[int, int]]], block: int, keys: int) -> KeysSeen:
    """From each block of queries' blocks of keys. Of many that a mask leaves out here and there,
    small ones are taken for seen: they are not worth a message of their own."""
    gap = -(-keys // block) // 64
    found = []
    for row in rows:
        wide: list[tuple[int, int]] = []
        for start, stop in row:
            if wide and start - wide[-1][1] <= gap:
                wide[-1] = wide[-1][0], stop
            else:
                wide.append((start, stop))
        found.append(tuple(Interval(a * block, min(b * block, keys)) for a, b in wide))
    return KeysSeen(block, keys, tuple(found))
