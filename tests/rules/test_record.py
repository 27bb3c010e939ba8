"""The recorder of ops: what torch's ``make_fx`` writes down, too."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mosaic.graph.record import recorded
from mosaic.torch_private import FakeTensorMode, decompositions_for_inductor, make_fx

aten = torch.ops.aten


def written_into(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total[:, 1:].add_(y[:, 1:])
    return total * total.mean()


def several(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    values, where = x.sort(-1)
    return values.softmax(-1), torch.where(y > 0, where, torch.arange(4, device=x.device))


def in_halves(x: Tensor, y: Tensor) -> list[Tensor]:
    """Of which one half is not used, and an input that is a result."""
    first, _ = (x @ y.mT).chunk(2, -1)
    return [x, first]


def lines(graph: fx.Graph) -> list[tuple[Any, ...]]:
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.op == "call_function" and node.target,
            node.op != "placeholder" and map_arg((node.args, node.kwargs), numbers.__getitem__),
            getattr(node.meta.get("val"), "shape", None),
        )
        for node in graph.nodes
    ]


@pytest.mark.parametrize("fn", [written_into, several, in_halves])
def test_it_writes_what_make_fx_writes(fn: Callable[..., Any]) -> None:
    table = decompositions_for_inductor()
    with FakeTensorMode(), torch.no_grad():
        x, y, a, b = (torch.randn(3, 4) for _ in range(4))
        made = make_fx(fn, decomposition_table=table)(a, b).graph
        made.eliminate_dead_code()
        assert lines(recorded(fn, [x, y], table)) == lines(made)


def test_a_write_is_read_later() -> None:
    def fn(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    with FakeTensorMode():
        graph = recorded(fn, [torch.randn(3)], {})
    (write,) = graph.find_nodes(op="call_function", target=aten.mul_.Tensor)
    (read,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert read.args == (write, 1)
    assert not graph.find_nodes(op="call_function", target=operator.getitem)
