"""Loops over rows that are written out, of which no recurrence is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx

#: Fewer rows may be parts of one tensor, as queries, keys and values are.
LEAST = 8
LOOP = "a loop takes rows one by one, and is not recognised as a recurrence"
NOTHING = "no attention in this graph: it stays whole"


def loops(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """The node that takes the last row, of which tensor, and in which dim."""
    taken: dict[tuple[fx.Node, int], dict[int, fx.Node]] = defaultdict(dict)
    for node in graph.nodes:
        if node.target is torch.ops.aten.select.int:
            x, dim, index = node.args
            taken[x, dim][index] = node
    for (x, dim), rows in taken.items():
        n = x.meta["val"].shape[dim]
        if n >= LEAST and len(rows) == n:
            yield rows[max(rows)], x, dim
