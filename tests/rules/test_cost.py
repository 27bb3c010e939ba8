"""The formulas of ``attention/cost.py`` against the lowered graphs, counted without ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from traffic import calls, held

from mosaic.api.methods import AllGather, Composed, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.blocks import Band
from mosaic.attention.cost import cost_of
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import Machine, strategy_of
from mosaic.attention.strategy import SPLIT_KV, Strategy
from mosaic.layout import Layout
from mosaic.torch_private import FakeTensorMode


def grouped(p: int, queries: int = 48, keys: int = 48, **others) -> AttentionProblem:
    sizes = {"batch": 2, "heads": 24, "kv_heads": 4, "dim": 5, "v_dim": 3, "itemsize": 8}
    return AttentionProblem(Layout.even(queries, p), Layout.even(keys, p), **{**sizes, **others})


def methods(p: int) -> Iterator[Method]:
    """Every method in every form that p ranks allow."""
    yield from (AllGather(), Ulysses(), Mesh2D(1, p))
    yield from (Ring(stages=stages) for stages in {2, 3, p} if stages <= p)
    yield Ring(stages=p, grad_dtype=torch.float32)
    for size in (n for n in range(2, p) if p % n == 0):
        yield Mesh2D(p // size, size)
        yield from (Hierarchical(size, intra) for intra in ("local", "ring", "ulysses", "mesh2d"))
        yield from (Hierarchical(size, intra, "mesh2d") for intra in ("local", "mesh2d"))
        mesh = f"s{size}"
        for sequence in (Ring(mesh=mesh), AllGather(mesh=mesh), Mesh2D(1, size, mesh=mesh)):
            yield Composed(Ulysses(mesh="h"), sequence)


def chosen(method: Method, given: AttentionProblem) -> Strategy:
    s = int(method.sequence.mesh[1:]) if isinstance(method, Composed) else 1
    return strategy_of(method, given, Machine(sizes=(("h", given.p // s), (f"s{s}", s))))[0]


def strategies(given: AttentionProblem) -> list[Strategy]:
    return list(dict.fromkeys([*(chosen(m, given) for m in methods(given.p)), SPLIT_KV]))


CASES = [*(grouped(p) for p in (2, 3, 4, 6, 8)), grouped(4, heads=8, kv_heads=1)]


@pytest.mark.parametrize("given", CASES)
def test_bytes(given: AttentionProblem):
    for strategy in strategies(given):
        cost = cost_of(strategy, given)
        there, back = (call.sent(given.p) for call in calls(strategy, given))
        found = sum(there), sum(back), len(there)
        assert found == pytest.approx((cost.forward, cost.backward, cost.sends)), strategy


def test_bytes_of_half_precision():
    """The log-sum-exp is float32 beside queries in bfloat16."""
    half = grouped(4, itemsize=2)
    for method in (Mesh2D(2, 2), Ulysses(), Ring(stages=4, grad_dtype=torch.float32)):
        strategy = chosen(method, half)
        cost = cost_of(strategy, half)
        there, back = (call.sent(4) for call in calls(strategy, half, torch.bfloat16))
        assert (sum(there), sum(back)) == pytest.approx((cost.forward, cost.backward)), strategy


@pytest.mark.parametrize("p", [3, 4])
def test_bytes_of_uneven_shards(p: int):
    """No rank sends more than for one row (of each kind, to each rank) above the formula."""
    given, rounded = grouped(p, 47, 46), grouped(p, -(-47 // p) * p, -(-46 // p) * p)
    for strategy in strategies(given):
        most = cost_of(strategy, rounded)
        for rank in (0, p - 1):
            there, back = (call.sent(p, rank) for call in calls(strategy, given, rank=rank))
            assert sum(there) <= most.forward * (1 + 1e-9), (strategy, rank)
            assert sum(back) <= most.backward * (1 + 1e-9), (strategy, rank)


@pytest.mark.parametrize("window", [5, 12])
@pytest.mark.parametrize("stages", [1, 8])
def test_a_window_moves_a_halo(window: int, stages: int):
    """On a rank that is not near an end: a query sees ``window`` keys, its own among them."""
    given = grouped(8, band=Band(window - 1, 0))
    strategy = chosen(Ring(stages=stages), given)
    cost = cost_of(strategy, given)
    there, back = (call.sent(8, 4) for call in calls(strategy, given, rank=4))
    assert (sum(there), sum(back)) == pytest.approx((cost.forward, cost.backward))


def long_keys(p: int, itemsize: int, cut: Callable[[int, int], Layout]) -> AttentionProblem:
    """Long keys and few queries, so that what is held is keys."""
    return AttentionProblem(cut(16, p), cut(256, p), 1, 8, 8, 8, 8, itemsize)


@pytest.mark.parametrize("cut", [Layout.even, Layout.zigzag])
def test_memory(cut: Callable[[int, int], Layout]):
    """In float32: for float64 some versions of torch hold the scores."""
    given = long_keys(4, 4, cut)
    small = 6 * given.kv_bytes / 4 * 16 / 256  # partial outputs and merges
    for strategy in strategies(given):
        with FakeTensorMode():
            forward, _ = calls(strategy, given, torch.float32, device="cpu")
            cost, found = cost_of(strategy, given), held(forward.graph())
        assert found <= cost.memory + small, strategy
        assert found >= 0.45 * cost.memory, strategy


def test_a_ring_holds_little():
    given = long_keys(8, 8, Layout.even)
    with FakeTensorMode():
        ring, gather = (
            [held(call.graph()) for call in calls(chosen(method, given), given, device="cpu")]
            for method in (Ring(stages=8), AllGather())
        )
    for few, many in zip(ring, gather, strict=True):  # forward, backward
        assert few < 0.5 * many
