"""The formulas of ``attention/cost.py`` against the lowered graphs, counted without ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from traffic import calls, held

from mosaic.api.methods import AllGather, Composed, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.blocks import Band
from mosaic.attention.cost import Shape, cost_of
from mosaic.attention.resolve import Facts, way_of
from mosaic.attention.strategy import SPLIT_KV, Strategy
from mosaic.layout import Layout
from mosaic.torch_private import FakeTensorMode

GROUPED = Shape(batch=2, heads=24, kv_heads=4, queries=48, keys=48, dim=5, v_dim=3, itemsize=8)
MULTI_QUERY = replace(GROUPED, heads=8, kv_heads=1)
HALF = replace(GROUPED, itemsize=2)


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


def way(method: Method, shape: Shape, p: int) -> Strategy:
    s = int(method.sequence.mesh[1:]) if isinstance(method, Composed) else 1
    return way_of(method, Facts(p, shape, sizes=(("h", p // s), (f"s{s}", s))))[0]


def ways(shape: Shape, p: int) -> list[Strategy]:
    return list(dict.fromkeys([*(way(method, shape, p) for method in methods(p)), SPLIT_KV]))


CASES = [(GROUPED, p) for p in (2, 3, 4, 6, 8)] + [(MULTI_QUERY, 4)]


@pytest.mark.parametrize(("shape", "p"), CASES)
def test_bytes(shape: Shape, p: int):
    for way in ways(shape, p):
        cost = cost_of(way, shape, p)
        there, back = (call.sent(p) for call in calls(way, shape, p))
        found = sum(there), sum(back), len(there)
        assert found == pytest.approx((cost.forward, cost.backward, cost.sends)), way


def test_bytes_of_half_precision():
    """The log-sum-exp is float32 beside queries in bfloat16."""
    for method in (Mesh2D(2, 2), Ulysses(), Ring(stages=4, grad_dtype=torch.float32)):
        chosen = way(method, HALF, 4)
        cost = cost_of(chosen, HALF, 4)
        there, back = (call.sent(4) for call in calls(chosen, HALF, 4, torch.bfloat16))
        assert (sum(there), sum(back)) == pytest.approx((cost.forward, cost.backward)), chosen


@pytest.mark.parametrize("p", [3, 4])
def test_bytes_of_uneven_shards(p: int):
    """No rank sends more than for one row (of each kind, to each rank) above the formula."""
    shape = replace(GROUPED, queries=47, keys=46)
    rounded = replace(shape, queries=-(-47 // p) * p, keys=-(-46 // p) * p)
    for way in ways(shape, p):
        most = cost_of(way, rounded, p)
        for rank in (0, p - 1):
            there, back = (call.sent(p, rank) for call in calls(way, shape, p, rank=rank))
            assert sum(there) <= most.forward * (1 + 1e-9), (way, rank)
            assert sum(back) <= most.backward * (1 + 1e-9), (way, rank)


@pytest.mark.parametrize("window", [5, 12])
@pytest.mark.parametrize("stages", [1, 8])
def test_a_window_moves_a_halo(window: int, stages: int):
    """On a rank that is not near an end: a query sees ``window`` keys, its own among them."""
    p, shape = 8, replace(GROUPED, window=window - 1)
    chosen = way(Ring(stages=stages), shape, p)
    cost, band = cost_of(chosen, shape, p), Band(window - 1, 0)
    there, back = (call.sent(p, 4) for call in calls(chosen, shape, p, rank=4, band=band))
    assert (sum(there), sum(back)) == pytest.approx((cost.forward, cost.backward))


@pytest.mark.parametrize("cut", [Layout.even, Layout.zigzag])
def test_memory(cut: Callable[[int, int], Layout]):
    """Long keys and few queries, so that what is held is keys. In float32: for float64 some
    versions of torch hold the scores."""
    p, shape = 4, Shape(1, 8, 8, queries=16, keys=256, dim=8, v_dim=8, itemsize=4)
    small = 6 * shape.kv_bytes / p * shape.queries / shape.keys  # partial outputs and merges
    for way in ways(shape, p):
        with FakeTensorMode():
            forward, _ = calls(way, shape, p, torch.float32, cut=cut, device="cpu")
            cost, found = cost_of(way, shape, p), held(forward.graph())
        assert found <= cost.memory + small, way
        assert found >= 0.45 * cost.memory, way


def test_a_ring_holds_little():
    shape = Shape(1, 8, 8, queries=16, keys=256, dim=8, v_dim=8, itemsize=8)
    with FakeTensorMode():
        ring, gather = (
            [held(call.graph()) for call in calls(way(method, shape, 8), shape, 8, device="cpu")]
            for method in (Ring(stages=8), AllGather())
        )
    for few, many in zip(ring, gather, strict=True):  # forward, backward
        assert few < 0.5 * many
