"""The formulas of ``attention/cost.py`` against the lowered graphs, counted without ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from traffic import calls, held

from mosaic.attention.blocks import Band
from mosaic.attention.cost import Shape, cost_of
from mosaic.attention.way import SPLIT_KV, Facts, Way, way_of
from mosaic.methods import AllGather, Composed, Hierarchical, Mesh2D, Method, Ring, Ulysses

GROUPED = Shape(batch=2, heads=24, kv_heads=4, queries=48, keys=48, dim=5, v_dim=3, itemsize=8)
MULTI_QUERY = replace(GROUPED, heads=8, kv_heads=1)
HALF = replace(GROUPED, itemsize=2, dim=6, v_dim=4)


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


def way(method: Method, shape: Shape, p: int) -> Way:
    s = int(method.sequence.mesh[1:]) if isinstance(method, Composed) else 1
    return way_of(method, Facts(p, shape, sizes={"h": p // s, f"s{s}": s}))[0]


def ways(shape: Shape, p: int) -> list[Way]:
    return list(dict.fromkeys([*(way(method, shape, p) for method in methods(p)), SPLIT_KV]))


@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [GROUPED, MULTI_QUERY], ids=["grouped", "multi_query"])
def test_bytes(shape: Shape, p: int):
    for way in ways(shape, p):
        cost = cost_of(way, shape, p)
        there, back = (call.sent(p) for call in calls(way, shape, p))
        found = sum(there), sum(back), len(there)
        assert found == pytest.approx((cost.forward, cost.backward, cost.sends)), way
