"""What a graph holds, by the ops in it: views, fused ops, gradients that are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import PeakBytes
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mosaic.report.memory import Kept, Lifetimes, Parameter, memory_of

N = 8 * 64 * 64  # bytes of a matrix


def matrices(count: int) -> list[Tensor]:
    return [torch.ones(64, 64, dtype=torch.float64) for _ in range(count)]


def graph_of(fn: Callable[..., Any], count: int = 2) -> fx.Graph:
    return make_fx(fn, tracing_mode="fake")(*matrices(count)).graph


def peak(fn: Callable[..., Any], count: int = 2) -> int:
    return Lifetimes(graph_of(fn, count)).peak({}, set())


def test_products_are_held_to_their_last_reader() -> None:
    def chain(x: Tensor, w: Tensor) -> Tensor:
        a = x @ w
        b = a @ w
        c = b.t() @ a
        return c @ w

    given = matrices(2)
    program = make_fx(chain, tracing_mode="fake")(*given)
    with PeakBytes() as seen:
        program(*given)
    assert peak(chain) == seen.peak == 3 * N


def test_what_is_fused_takes_no_memory() -> None:
    assert peak(lambda x, w: (x.sin().cos() * w).sum()) == 8
    assert peak(lambda x, w: (x.sin() @ w).cos().sum()) == 2 * N  # a product reads and gives


def test_a_view_takes_none_and_keeps_its_base() -> None:
    graph = graph_of(lambda x, w: (x @ w).split(32)[0], 2)
    (out,) = graph.output_node().all_input_nodes
    lifetimes = Lifetimes(graph)
    assert [root.target for root in lifetimes.made(out)] == [torch.ops.aten.mm.default]
    assert lifetimes.peak({}, set()) == N


def test_of_a_result_that_is_cut_a_share_stays() -> None:
    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x @ w, x.t() @ w, x @ w.t(), x.t() @ w.t()

    lifetimes = Lifetimes(graph_of(gradients))
    assert lifetimes.peak({}, set()) == 4 * N
    assert lifetimes.peak({}, set(), shards=4) == 3 * N // 4 + N


def test_a_program_of_several_graphs_has_each_parameter_once() -> None:
    weight = Parameter("weight", 1000, 2, is_trained=True)
    frozen = Parameter("frozen", 500, 2, is_trained=False)
    kept = [Kept(activations=4000, peak=9000), Kept(activations=100, logits=50, peak=200)]
    found = memory_of([weight, frozen, weight], kept, shards=2, dtype=torch.float32)
    assert (found.parameters, found.gradients, found.optimizer) == (3000, 2000, 4000)
    assert (found.activations, found.logits, found.kept) == (4100, 50, 4150)
    assert found.peak == 3000 + 4000 + 4150 + 5000
    assert str(found).splitlines()[-1].split() == ["at", "most", "in", "a", "step", "15.8", "KiB"]
