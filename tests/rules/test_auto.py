"""What "auto" chooses, and the rules that follow from the volumes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mosaic.api.methods import AllGather, Auto, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.blocks import Band
from mosaic.attention.cost import Cost, cost_of
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import ONE_NODE, Machine, resolve, strategy_of
from mosaic.attention.strategy import LOCAL, SPLIT_KV, Strategy
from mosaic.attention.timing import pipelined, seconds_of
from mosaic.layout import Layout, Place


def problem(p: int, heads: int, kv_heads: int, n: int = 1 << 17) -> AttentionProblem:
    cut = Layout.even(n, p)
    return AttentionProblem(cut, cut, 1, heads, kv_heads, 128, 128, itemsize=2)


def auto(given: AttentionProblem, **machine) -> tuple[Strategy, str]:
    return strategy_of(Auto(), given, Machine(**machine))


def volumes(method: Method, given: AttentionProblem) -> tuple[float, float]:
    """Bytes sent, forward and backward, by those of a rank's queries."""
    cost = cost_of(strategy_of(method, given)[0], given)
    q = given.query.n / given.p * given.heads * given.dim * given.itemsize
    return cost.forward / q, cost.backward / q


@pytest.mark.parametrize(
    ("p", "heads", "kv_heads", "method", "forward", "backward"),
    [
        (8, 32, 32, Ring(), 14, 28),
        (8, 32, 32, Ulysses(), 3.5, 3.5),
        (8, 32, 32, Mesh2D(2, 4), 8, 16),
        (8, 32, 8, AllGather(), 3.5, 7),
        (8, 32, 8, Ulysses(), 2.19, 2.19),
        (8, 64, 8, AllGather(), 1.75, 3.5),
        (8, 64, 8, Ulysses(), 1.97, 1.97),
        (32, 32, 32, Mesh2D(4, 8), 20, 40),
        (64, 32, 8, Ring(), 31.5, 63),
        (64, 32, 8, Mesh2D(16, 4), 13.5, 27),
        (256, 32, 32, Mesh2D(16, 16), 60, 120),
    ],
)
def test_volumes_of_the_literature(p, heads, kv_heads, method, forward, backward):
    found = volumes(method, problem(p, heads, kv_heads))
    assert found == pytest.approx((forward, backward), 0.01)


@pytest.mark.parametrize("kv_heads", [64, 32, 16, 8])
def test_gathered_keys_beat_ulysses_below_group_plus_one_ranks(kv_heads: int):
    for p in (2, 4, 8):
        given = problem(p, 64, kv_heads)
        gather, ulysses = (volumes(m, given)[0] for m in (AllGather(), Ulysses()))
        group = 64 // kv_heads
        assert (gather < ulysses) == (p < group + 1) or p == group + 1


def test_nodes_send_few_keys_to_each_other():
    given = problem(32, 32, 8)
    for intra in ("local", "ring"):
        strategy, _ = strategy_of(Hierarchical(8, intra), given)
        assert cost_of(strategy, given, node_size=8).between == 3 * given.kv_bytes / 32
    ring, _ = strategy_of(Ring(), given)
    assert cost_of(ring, given, node_size=8).between == 24 * given.kv_bytes / 32


def test_what_is_at_work_hides_what_travels():
    assert pipelined([0, 2, 2], [3, 3, 3], home=0) == 9
    assert pipelined([1, 4], [3, 3], home=0) == 1 + 4 + 3
    assert pipelined([0, 2, 2], [3, 3, 3], home=1) == 3 + 3 + 3 + 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "p", "node_size", "name"),
    [
        (16, 16, 1 << 11, 4, 0, "all_gather"),  # little work: fewest launches
        (32, 8, 1 << 14, 4, 0, "ring(stages=2)"),  # the gather behind a rank's own keys
        (16, 16, 1 << 14, 16, 8, "ulysses(16)"),
        (1, 1, 1 << 14, 64, 8, "mesh2d(4, 16)"),  # heads do not divide
        (1, 1, 1 << 17, 64, 8, "hierarchical(8, local, mesh2d)"),
    ],
)
def test_choice(heads, kv_heads, n, p, node_size, name):
    causal = replace(problem(p, heads, kv_heads, n), band=Band(None, 0))
    strategy, note = auto(causal, node_size=node_size)
    assert strategy.name == name
    assert note.startswith(f"auto: {name}: ") and "; next best " in note


def test_choice_keeps_masks_with_their_rows_and_heads_whole():
    given = problem(16, 16, 16, 1 << 14)
    masked = replace(given, has_rows=True)
    for other in (masked, replace(given, heads_cut=Place(Layout.even(16, 2), 1))):
        strategy, _ = auto(other, node_size=8)
        assert strategy.heads == 1
        assert other is not masked or strategy.inter.cols == strategy.intra.cols == 1


def test_choice_fits_into_memory():
    given = problem(8, 16, 16, 1 << 11)
    assert auto(given)[0].name == "all_gather"
    strategy, _ = auto(given, memory=2 * given.kv_bytes)
    assert cost_of(strategy, given).memory <= given.kv_bytes / 2
    strategy, _ = auto(given, memory=1)  # nothing fits: the least
    assert cost_of(strategy, given).memory == min(
        cost_of(strategy_of(m, given)[0], given).memory
        for m in (Ring(stages=8), AllGather(), Mesh2D(2, 4), Mesh2D(4, 2), Mesh2D(1, 8), Ulysses())
    )


def test_alone_nothing_is_sent():
    given = problem(1, 4, 4)
    strategy, _ = auto(given)
    assert cost_of(strategy, given) == Cost()
    assert seconds_of(strategy, given).forward > 0


def test_whole_keys_need_no_method_and_whole_queries_one_merge():
    cut, whole, alone = Layout.even(16, 4), Layout.whole(16, 4), Layout.whole(16, 1)

    def found(query: Layout, key: Layout, method: Method) -> tuple[Strategy, str]:
        given = replace(problem(4, 4, 4, 16), query=query, key=key)
        return resolve(method, given, ONE_NODE)

    assert found(cut, cut, Ring()) == strategy_of(Ring(), problem(4, 4, 4, 16))
    assert found(cut, whole, Ring()) == found(whole, whole, Ring()) == (LOCAL, "")
    assert found(whole, cut, Ring()) == (SPLIT_KV, "")
    assert found(alone, alone, Mesh2D(2, 2)) == (LOCAL, "")
