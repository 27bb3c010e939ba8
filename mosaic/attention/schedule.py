"""Who hears from whom: every method as a few hops between ranks. Pure Python, no torch.

A hop says for each rank whose chunks it gets, in order; its own it keeps. Keys reach a rank in two
hops, from node to node (a window) and within the node (a step), and are attended to after each
step.
Chunks come straight from whoever holds them, so a ring of p is p - 1 shifts by 1, 2, ... ranks.

>>> for window in schedule(Strategy("ring(3)", intra=Level(3, 1, 3)), 3).windows:
...     print(*window.steps)
((0,), (1,), (2,)) ((2,), (0,), (1,)) ((1,), (2,), (0,))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

from mosaic.attention.strategy import Level, Strategy

#: For each rank the ranks whose chunks it gets.
Hop = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Window:
    """Chunks come to a node by ``hop``, and are then passed round in it, one step after another."""

    hop: Hop
    steps: tuple[Hop, ...]


@dataclass(frozen=True)
class Schedule:
    """Whose queries each rank gathers, and the windows in which keys visit it."""

    queries: Hop
    windows: tuple[Window, ...]


@lru_cache(maxsize=32)
def schedule(strategy: Strategy, p: int) -> Schedule:
    """The hops of ``strategy`` over ``p`` ranks (those that are left after heads were cut)."""
    inter, intra = strategy.inter, strategy.intra
    if inter.size * intra.size == 1:
        return Schedule(identity(p), (Window(identity(p), (identity(p),)),))
    assert inter.size * intra.size == p, (strategy, p)
    ranks = list(product(*(range(n) for n in (inter.rows, inter.cols, intra.rows, intra.cols))))
    number = {place: rank for rank, place in enumerate(ranks)}
    queries = tuple(
        tuple(number[R, J, r, j] for J in range(inter.cols) for j in range(intra.cols))
        for R, _, r, _ in ranks
    )
    windows = tuple(
        tuple(tuple(number[(R - o) % inter.rows, C, r, c] for o in back) for R, C, r, c in ranks)
        for back in portions(inter)
    )
    steps = tuple(
        tuple(tuple(number[R, C, (r - o) % intra.rows, c] for o in back) for R, C, r, c in ranks)
        for back in portions(intra)
    )
    return Schedule(queries, tuple(Window(hop, steps) for hop in windows))


def identity(p: int) -> Hop:
    return tuple((rank,) for rank in range(p))


def portions(level: Level) -> list[range]:
    """How far back the ranks are whose keys come in each stage: its own first, then groups."""
    if level.stages == 1:
        return [range(level.rows)]
    groups = level.stages - 1
    cuts = [1 + i * (level.rows - 1) // groups for i in range(groups + 1)]
    return [range(1), *(range(a, b) for a, b in pairwise(cuts))]


def head_group(strategy: Strategy, rank: int, world: int) -> tuple[int, ...]:
    """The ranks with which ``rank`` exchanges sequence for heads."""
    apart = world // strategy.heads if strategy.is_outer else 1
    first = rank % apart if strategy.is_outer else rank - rank % strategy.heads
    return tuple(first + slot * apart for slot in range(strategy.heads))


def same_heads(strategy: Strategy, rank: int, world: int) -> tuple[int, ...]:
    """The ranks that hold ``rank``'s heads after the exchange, one of each group."""
    if strategy.is_outer:
        apart = world // strategy.heads
        return tuple(range(rank - rank % apart, rank - rank % apart + apart))
    return tuple(range(rank % strategy.heads, world, strategy.heads))
