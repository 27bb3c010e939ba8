"""What the ranks compare of their graphs is what has to be the same on all of them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mosaic.frontend.digest import text_of


def graph_of(*sizes: str, is_read: bool = False) -> fx.Graph:
    """One that doubles x; it is given numbers, too."""
    graph = fx.Graph()
    numbers = [graph.placeholder(name) for name in sizes]
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    out = graph.call_function(operator.mul, (x, numbers[0] if is_read else 2))
    graph.output(out)
    return graph


def test_the_size_of_a_part_that_nobody_reads_is_left_out() -> None:
    """Dynamo adds it on a rank whose part has another size than in the step before."""
    assert text_of(graph_of("size")) == text_of(graph_of())
    assert text_of(graph_of("size", is_read=True)) != text_of(graph_of())


def test_shapes_are_compared() -> None:
    other = graph_of()
    other.find_nodes(op="placeholder")[0].meta["val"] = torch.empty(2, 4)
    assert text_of(other) != text_of(graph_of())
