"""Which keys travel where the mask is known when compiling: only what somebody sees."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from known_masks import MASKS, attends
from mask_programs import attention_of, read
from sampling import FULL
from torch import Tensor
from traffic import calls

import mosaic
from mosaic.api.methods import AllGather, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.cost import cost_of
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import strategy_of
from mosaic.attention.route import route_of
from mosaic.attention.strategy import Strategy
from mosaic.attention.transfer import Transfer
from mosaic.layout import Layout
from mosaic.masks import known
from mosaic.masks.constants import Constants
from mosaic.masks.known import keys_seen
from mosaic.masks.words import band_of
from mosaic.partition.values import Call

SIZES = {"batch": 2, "heads": 8, "kv_heads": 4, "dim": 4, "v_dim": 4, "itemsize": 4}


def call_of(name: str, p: int) -> Call:
    """The attention as ``analyze_masks`` leaves it."""
    tensors = [torch.randn(2, heads, 16 * p, 4) for heads in (8, 4, 4)]
    node = attention_of(read(attends(name), *tensors))
    return Call(node.target, node.args, node.kwargs, None, node)


def problem(name: str, p: int, cut=Layout.even) -> AttentionProblem:
    call, n = call_of(name, p), 16 * p
    seen = call.like.meta["seen"]
    return AttentionProblem(cut(n, p), cut(n, p), **SIZES, band=band_of(call.bound), seen=seen)


def methods(p: int) -> list[Method]:
    grids = sorted({(p // 2, 2), (2, p // 2)})
    found: list[Method] = [Ring(stages=p), Ring(stages=2), AllGather(), Ulysses()]
    found += [Mesh2D(*grid) for grid in grids]
    return found + [Hierarchical(2, intra) for intra in ("local", "ring", "ulysses", "mesh2d")]


def cases(p: int) -> Iterator[tuple[str, AttentionProblem, Strategy]]:
    for name, cut in product(MASKS, (Layout.even, Layout.zigzag)):
        given = problem(name, p, cut)
        for method in methods(p):
            yield f"{name}, {cut.__name__}, {method}", given, strategy_of(method, given)[0]


def plan_of(given: AttentionProblem, strategy: Strategy, rank: int) -> AttentionPlan:
    seen = None if given.seen is None else given.seen.layout(given.query)
    plan = AttentionPlan(strategy, rank, "", given.query, given.key, given.band, seen=seen)
    return plan.after_heads(given.heads) if strategy.heads > 1 else plan


@pytest.mark.parametrize("p", [4, FULL(8)])
def test_what_is_seen_arrives_and_nothing_else_travels(p: int) -> None:
    """Each pair that is seen is attended once (by each rank of a group that has other heads)."""
    at = torch.arange(16 * p)
    for case, given, strategy in cases(p):
        sees = MASKS[case.partition(", ")[0]](at[:, None], at).expand(16 * p, -1)
        count = torch.zeros(16 * p, 16 * p)
        for rank in range(p):
            route = route_of(plan_of(given, strategy, rank))
            rows = [i for interval in route.rows for i in range(*interval)]
            steps = [stop.step for stop in route.stops]
            for stop in route.stops:
                keys = [j for interval in stop.keys for j in range(*interval)]
                count[torch.tensor(rows)[:, None], torch.tensor(keys, dtype=torch.long)] += 1
            if not any(step.is_gather for step in steps):
                assert not [source for step in steps for source in unseen(step, rows, sees)], case
        assert (count[sees] == strategy.heads).all(), case


def unseen(hop: Transfer, rows: list[int], sees: Tensor) -> list[int]:
    """The ranks of whose keys something comes, and nothing is seen."""
    return [
        source
        for source, held in hop.received
        if held and not sees[rows][:, [j for interval in held for j in range(*interval)]].any()
    ]


@pytest.mark.parametrize(("p", "every"), [(4, 17), FULL(4, 1), FULL(8, 3)])
def test_costs_are_what_the_busiest_rank_sends(p: int, every: int) -> None:
    for case, given, strategy in list(cases(p))[::every]:
        cost = cost_of(strategy, given)
        sent = [
            [sum(x.sent(p, r)) for x in calls(strategy, given, torch.float32, r)] for r in range(p)
        ]
        there, back = zip(*sent, strict=True)
        assert max(there) == pytest.approx(cost.forward), case
        assert sum(back) / p <= cost.backward * (1 + 1e-9), case


def test_bounds_of_vectors_say_the_same_of_long_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a mask's ops are known; stripes are not."""
    for name in set(MASKS) - {"stripes", "causal", "window", "both sides"}:
        call = call_of(name, 4)
        exact = keys_seen(call.bound, Constants())
        with monkeypatch.context() as patched:
            patched.setattr(known, "LIMIT", 0)
            assert keys_seen(call.bound, Constants()) == exact, name


def test_long_axes_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "BLOCKS", 8)
    found = keys_seen(call_of("causal blocks", 4).bound, Constants())
    assert found is not None and (found.block, len(found.blocks)) == (8, 8)
    assert found.of(((20, 28),)) == ((16, 32),)  # its first and its last block


#: KiB that the busiest of 4 and of 8 ranks sends in a ring; all would be 12 and 28.
SENT = {
    "causal": (12, 28),
    "window": (1, 1),
    "both sides": (1.5, 1.5),
    "causal blocks": (0, 0),
    "blocks across ranks": (4, 4),
    "prefix of blocks": (6, 14),
    "stripes": (12, 28),
}


@pytest.mark.parametrize("p", [4, FULL(8)])
def test_plans_say_the_bytes(p: int) -> None:
    spec = mosaic.ShardingSpec(inputs=dict.fromkeys("qkv", "batch heads n dim"), axes={"n": "ring"})
    tensors = [torch.zeros(2, heads, 16 * p, 4) for heads in (8, 4, 4)]
    plans = {name: mosaic.explain(attends(name), *tensors, spec=spec, sp_size=p) for name in MASKS}
    sent = {name: plan.attentions[0].bytes / 1024 for name, plan in plans.items()}
    assert sent == {name: each[p == 8] for name, each in SENT.items()}
    assert ("keys: causal, documents: 0 B sent of", p) == (plans["causal blocks"].notes[0][:36], p)
