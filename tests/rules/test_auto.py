"""What "auto" chooses, and the rules that follow from the volumes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mosaic.api.methods import AllGather, Auto, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.cost import Cost, Shape, cost_of
from mosaic.attention.resolve import Facts, way_between, way_of
from mosaic.attention.strategy import LOCAL, SPLIT_KV, Strategy
from mosaic.attention.timing import pipelined, seconds_of
from mosaic.layout import Layout


def shape(heads: int, kv_heads: int, n: int = 1 << 17) -> Shape:
    return Shape(1, heads, kv_heads, n, n, 128, 128, itemsize=2)


def auto(given: Shape, p: int, **facts) -> tuple[Strategy, str]:
    return way_of(Auto(), Facts(p, given, **facts))


def volumes(method: Method, given: Shape, p: int) -> tuple[float, float]:
    """Bytes sent, forward and backward, by those of a rank's queries."""
    cost = cost_of(way_of(method, Facts(p, given))[0], given, p)
    q = given.queries / p * given.heads * given.dim * given.itemsize
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
    assert volumes(method, shape(heads, kv_heads), p) == pytest.approx((forward, backward), 0.01)


@pytest.mark.parametrize("kv_heads", [64, 32, 16, 8])
def test_gathered_keys_beat_ulysses_below_group_plus_one_ranks(kv_heads: int):
    for p in (2, 4, 8):
        given = shape(64, kv_heads)
        gather, ulysses = (volumes(m, given, p)[0] for m in (AllGather(), Ulysses()))
        group = 64 // kv_heads
        assert (gather < ulysses) == (p < group + 1) or p == group + 1


def test_nodes_send_few_keys_to_each_other():
    given = shape(32, 8)
    for intra in ("local", "ring"):
        way, _ = way_of(Hierarchical(8, intra), Facts(32, given))
        assert cost_of(way, given, 32, node_size=8).between == 3 * given.kv_bytes / 32
    ring, _ = way_of(Ring(), Facts(32, given))
    assert cost_of(ring, given, 32, node_size=8).between == 24 * given.kv_bytes / 32


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
    given = replace(shape(heads, kv_heads, n), area=0.5)
    way, note = auto(given, p, node_size=node_size)
    assert way.name == name
    assert note.startswith(f"auto: {name}: ") and "; next best " in note


def test_choice_keeps_masks_with_their_rows_and_heads_whole():
    given = shape(16, 16, 1 << 14)
    for facts in ({"has_rows": True}, {"heads_are_cut": True}):
        way, _ = auto(given, 16, **facts, node_size=8)
        assert way.heads == 1
        assert not facts.get("has_rows") or way.inter.cols == way.intra.cols == 1


def test_choice_fits_into_memory():
    given = shape(16, 16, 1 << 11)
    assert auto(given, 8)[0].name == "all_gather"
    way, _ = auto(given, 8, memory=2 * given.kv_bytes)
    assert cost_of(way, given, 8).memory <= given.kv_bytes / 2
    way, _ = auto(given, 8, memory=1)  # nothing fits: the least
    assert cost_of(way, given, 8).memory == min(
        cost_of(way_of(m, Facts(8, given))[0], given, 8).memory
        for m in (Ring(stages=8), AllGather(), Mesh2D(2, 4), Mesh2D(4, 2), Mesh2D(1, 8), Ulysses())
    )


def test_alone_nothing_is_sent():
    given = shape(4, 4)
    way, _ = auto(given, 1)
    assert cost_of(way, given, 1) == Cost()
    assert seconds_of(way, given, 1).forward > 0


def test_whole_keys_need_no_method_and_whole_queries_one_merge():
    given, cut, whole = shape(4, 4, 16), Layout.even(16, 4), Layout.whole(16, 4)
    ring, facts = Ring(), Facts(4, given)
    assert way_between(ring, facts, cut, cut) == way_of(ring, facts)
    assert way_between(ring, facts, cut, whole) == way_between(ring, facts, whole, whole)
    assert way_between(ring, facts, whole, whole) == (LOCAL, "")
    assert way_between(ring, facts, whole, cut) == (SPLIT_KV, "")
    alone = Layout.whole(16, 1)
    assert way_between(Mesh2D(2, 2), Facts(1, given), alone, alone) == (LOCAL, "")
