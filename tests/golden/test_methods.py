"""What each method does on 4 ranks: who hears from whom; then the programs of rank 1.

12 positions, 3 on each rank, 4 heads of 2 numbers. q_1, k_1 and v_1 are this rank's, and in
backward dout_1, out_1 and lse_1. A buffer has a row for each position; ``receive`` and ``send``
count rows for each rank. ``shift`` is an all-to-all in which nobody has two peers. What travels is
waited for where it is used first.
"""

from __future__ import annotations

from pathlib import Path

from traffic import calls

from mosaic.api.methods import AllGather, Composed, Hierarchical, Mesh2D, Method, Ring, Ulysses
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import Machine, strategy_of
from mosaic.attention.schedule import Hop, head_group, same_heads, schedule
from mosaic.attention.strategy import SPLIT_KV, Strategy
from mosaic.attention.table import methods_table
from mosaic.layout import Layout
from mosaic.report.show import listing
from mosaic.torch_private import FakeTensorMode

GIVEN = "placeholder"
CUT = Layout.even(12, 4)
PROBLEM = AttentionProblem(CUT, CUT, batch=1, heads=4, kv_heads=4, dim=2, v_dim=2, itemsize=8)


def chosen(method: Method) -> Strategy:
    return strategy_of(method, PROBLEM, Machine(sizes=(("h", 2), ("s", 2))))[0]


def told(strategy: Strategy) -> str:
    """Who hears from whom, in the order in which it comes: a column for each rank. ``0+1`` are the
    positions of ranks 0 and 1, whose heads were exchanged."""
    ranks = range(CUT.p)
    hops = schedule(strategy, CUT.p // strategy.heads)
    rows = {}
    if strategy.heads > 1:
        rows["heads"] = [held(strategy, rank) for rank in ranks]
    if not strategy.everywhere and strategy.inter.cols * strategy.intra.cols > 1:
        rows["queries"] = [heard(strategy, rank, hops.queries) for rank in ranks]
    stops = [(window.hop, step) for window in hops.windows for step in window.steps]
    for number, (hop, step) in enumerate(stops, 1):
        passed = tuple(tuple(c for r in from_ranks for c in hop[r]) for from_ranks in step)
        rows[f"keys {number}"] = [heard(strategy, rank, passed) for rank in ranks]
    lines = (f"{name:<8} {' | '.join(f'{x:<8}' for x in row)}" for name, row in rows.items())
    return "\n".join(line.rstrip() for line in lines)


def held(strategy: Strategy, rank: int) -> str:
    return "+".join(map(str, head_group(strategy, rank, CUT.p)))


def heard(strategy: Strategy, rank: int, hop: Hop) -> str:
    """Whose chunks a rank gets."""
    members = same_heads(strategy, rank, CUT.p)
    return " ".join(held(strategy, members[chunk]) for chunk in hop[members.index(rank)])


def listings(strategy: Strategy) -> tuple[str, str]:
    """Forward and backward, without the types of what a rank is given."""
    with FakeTensorMode():
        graphs = [call.graph() for call in calls(strategy, PROBLEM, device="cpu")]
    forward, backward = (
        listing(graph, fold_waits=True, brief=True).split("\n", len(graph.find_nodes(op=GIVEN)))[-1]
        for graph in graphs
    )
    return forward, backward


def test_ring(check):
    check(
        told(chosen(Ring(stages=3))),
        """\
keys 1   0        | 1        | 2        | 3
keys 2   3        | 0        | 1        | 2
keys 3   2 1      | 3 2      | 0 3      | 1 0
""",
    )
    forward, backward = listings(chosen(Ring(stages=3)))
    check(
        forward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all: f64[3, 16] = shift(cat, to=2, from=0, 'sp')
flash: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, k_1, v_1, scale=1)
expand: f64[2, 3, 16] = expand(cat)
all_to_all_1: f64[6, 16] = all_to_all(expand, receive=[0, 0, 3, 3], send=[3, 0, 0, 3], 'sp')
flash_1: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, all_to_all[:, :8], all_to_all[:, 8:16],
    scale=1)
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3] = fused[maximum eq .. 17 ops](flash, flash_1)
flash_2: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, all_to_all_1[:, :8], all_to_all_1[:, 8:16],
    scale=1)
add_4: f64[1, 4, 3, 2], add_5: f64[1, 4, 3] = fused[maximum eq .. 17 ops](add_2, flash_2, add_1)
return [add_4, q_1, k_1, v_1, add_4, add_5]
""",
    )
    check(
        backward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all: f64[3, 16] = shift(cat, to=2, from=0, 'sp')
flash_backward: (f64[1, 4, 3, 2], f64[1, 4, 3, 2], f64[1, 4, 3, 2]) = flash_backward(dout_1, q_1,
    k_1, v_1, out_1, lse_1, 0, False, scale=1)
add: f64[1, 4, 3, 2] = add(0, flash_backward[0])
expand: f64[2, 3, 16] = expand(cat)
all_to_all_1: f64[6, 16] = all_to_all(expand, receive=[0, 0, 3, 3], send=[3, 0, 0, 3], 'sp')
flash_backward_1: (f64[1, 4, 3, 2], f64[1, 4, 3, 2], f64[1, 4, 3, 2]) = flash_backward(dout_1,
    q_1, all_to_all[:, :8], all_to_all[:, 8:16], out_1, lse_1, 0, False, scale=1)
add_1: f64[1, 4, 3, 2] = add(add, flash_backward_1[0])
cat_1: f64[3, 16] = cat([flash_backward_1[1], flash_backward_1[2]], 1)
all_to_all_2: f64[3, 16] = shift(cat_1, to=0, from=2, 'sp')
flash_backward_2: (f64[1, 4, 3, 2], f64[1, 4, 6, 2], f64[1, 4, 6, 2]) = flash_backward(dout_1,
    q_1, all_to_all_1[:, :8], all_to_all_1[:, 8:16], out_1, lse_1, 0, False, scale=1)
add_2: f64[1, 4, 3, 2] = add(add_1, flash_backward_2[0])
cat_2: f64[6, 16] = cat([flash_backward_2[1], flash_backward_2[2]], 1)
all_to_all_3: f64[6, 16] = all_to_all(cat_2, receive=[3, 0, 0, 3], send=[0, 0, 3, 3], 'sp')
add_3: f64[1, 4, 3, 2], add_4: f64[1, 4, 3, 2] = fused[add add](flash_backward, all_to_all_2[:,
    :8], all_to_all_2[:, 8:16])
sum_1: f64[1, 4, 3, 2] = sum(all_to_all_3[:, :8], [2])
add_5: f64[1, 4, 3, 2] = add(add_3, sum_1)
sum_2: f64[1, 4, 3, 2] = sum(all_to_all_3[:, 8:16], [2])
add_6: f64[1, 4, 3, 2] = add(add_4, sum_2)
return [add_2, add_5, add_6]
""",
    )


def test_all_gather(check):
    check(
        told(chosen(AllGather())),
        """\
keys 1   0 3 2 1  | 1 0 3 2  | 2 1 0 3  | 3 2 1 0
""",
    )
    forward, backward = listings(chosen(AllGather()))
    check(
        forward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_gather: f64[12, 16] = all_gather(cat, 4, 'sp')
flash: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, all_gather[:, :8], all_gather[:, 8:16],
    scale=1)
return [flash[0], q_1, k_1, v_1, flash[0], flash[1]]
""",
    )
    check(
        backward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_gather: f64[12, 16] = all_gather(cat, 4, 'sp')
flash_backward: (f64[1, 4, 3, 2], f64[1, 4, 12, 2], f64[1, 4, 12, 2]) = flash_backward(dout_1,
    q_1, all_gather[:, :8], all_gather[:, 8:16], out_1, lse_1, 0, False, scale=1)
add: f64[1, 4, 3, 2] = add(0, flash_backward[0])
cat_1: f64[1, 4, 9, 2] = cat([flash_backward[1][:, :, :3], flash_backward[1][:, :, 6:12]], 2)
cat_2: f64[1, 4, 9, 2] = cat([flash_backward[2][:, :, :3], flash_backward[2][:, :, 6:12]], 2)
cat_3: f64[9, 16] = cat([cat_1, cat_2], 1)
all_to_all: f64[9, 16] = all_to_all(cat_3, receive=[3, 0, 3, 3], send=[3, 0, 3, 3], 'sp')
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3, 2] = fused[add add](all_to_all[:, :8][:, :, :3],
    flash_backward[1][:, :, 3:6], all_to_all[:, 8:16][:, :, :3], flash_backward[2][:, :, 3:6])
sum_1: f64[1, 4, 3, 2] = sum(all_to_all[:, :8][:, :, 3:9], [2])
add_3: f64[1, 4, 3, 2] = add(add_1, sum_1)
sum_2: f64[1, 4, 3, 2] = sum(all_to_all[:, 8:16][:, :, 3:9], [2])
add_4: f64[1, 4, 3, 2] = add(add_2, sum_2)
return [add, add_3, add_4]
""",
    )


def test_mesh2d(check):
    check(
        told(chosen(Mesh2D(2, 2))),
        """\
queries  0 1      | 0 1      | 2 3      | 2 3
keys 1   0 2      | 1 3      | 2 0      | 3 1
""",
    )
    forward, backward = listings(chosen(Mesh2D(2, 2)))
    check(
        forward,
        """\
all_to_all: f64[3, 8] = shift(q_1, to=0, from=0, 'sp')
cat: f64[1, 4, 6, 2] = cat([all_to_all, q_1], 2)
cat_1: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all_1: f64[3, 16] = shift(cat_1, to=3, from=3, 'sp')
cat_2: f64[1, 4, 6, 2] = cat([k_1, all_to_all_1[:, :8]], 2)
cat_3: f64[1, 4, 6, 2] = cat([v_1, all_to_all_1[:, 8:16]], 2)
flash: (f64[1, 4, 6, 2], f64[1, 4, 6]) = flash(cat, cat_2, cat_3, scale=1)
all_to_all_2: f64[3, 8] = shift(flash[0][:, :, :3], to=0, from=0, 'sp')
all_to_all_3: f64[3, 4] = shift(flash[1][:, :, :3], to=0, from=0, 'sp')
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3] = fused[maximum eq .. 17 ops](all_to_all_3,
    flash[1][:, :, 3:6], all_to_all_2, flash[0][:, :, 3:6])
return [add_1, q_1, k_1, v_1, add_1, add_2]
""",
    )
    check(
        backward,
        """\
cat: f64[3, 24] = cat([dout_1, q_1, out_1], 1)
all_to_all: f64[3, 24] = shift(cat, to=0, from=0, 'sp')
cat_1: f64[1, 4, 6, 2] = cat([all_to_all[:, :8], dout_1], 2)
cat_2: f64[1, 4, 6, 2] = cat([all_to_all[:, 8:16], q_1], 2)
cat_3: f64[1, 4, 6, 2] = cat([all_to_all[:, 16:24], out_1], 2)
all_to_all_1: f64[3, 4] = shift(lse_1, to=0, from=0, 'sp')
cat_4: f64[1, 4, 6, 1] = cat([all_to_all_1, lse_1], 2)
cat_5: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all_2: f64[3, 16] = shift(cat_5, to=3, from=3, 'sp')
cat_6: f64[1, 4, 6, 2] = cat([k_1, all_to_all_2[:, :8]], 2)
cat_7: f64[1, 4, 6, 2] = cat([v_1, all_to_all_2[:, 8:16]], 2)
flash_backward: (f64[1, 4, 6, 2], f64[1, 4, 6, 2], f64[1, 4, 6, 2]) = flash_backward(cat_1, cat_2,
    cat_6, cat_7, cat_3, cat_4, 0, False, scale=1)
add: f64[1, 4, 6, 2] = add(0, flash_backward[0])
cat_8: f64[3, 16] = cat([flash_backward[1][:, :, 3:6], flash_backward[2][:, :, 3:6]], 1)
all_to_all_3: f64[3, 16] = shift(cat_8, to=3, from=3, 'sp')
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3, 2] = fused[add add](flash_backward[1][:, :, :3],
    all_to_all_3[:, :8], flash_backward[2][:, :, :3], all_to_all_3[:, 8:16])
all_to_all_4: f64[3, 8] = shift(add[:, :, :3], to=0, from=0, 'sp')
add_3: f64[1, 4, 3, 2] = add(all_to_all_4, add[:, :, 3:6])
return [add_3, add_1, add_2]
""",
    )


def test_ulysses(check):
    check(
        told(chosen(Ulysses())),
        """\
heads    0+1+2+3  | 0+1+2+3  | 0+1+2+3  | 0+1+2+3
keys 1   0+1+2+3  | 0+1+2+3  | 0+1+2+3  | 0+1+2+3
""",
    )
    forward, backward = listings(chosen(Ulysses()))
    check(
        forward,
        """\
cat: f64[72] = cat([q_1[:, :1], k_1[:, :1], v_1[:, :1], q_1[:, 1:2], k_1[:, 1:2], v_1[:, 1:2],
    q_1[:, 2:3], k_1[:, 2:3], v_1[:, 2:3], q_1[:, 3:4], k_1[:, 3:4], v_1[:, 3:4]])
all_to_all: f64[72] = all_to_all(cat, receive=[18, 18, 18, 18], send=[18, 18, 18, 18], 'sp')
cat_1: f64[1, 1, 12, 2] = cat([all_to_all[:6], all_to_all[18:24], all_to_all[36:42],
    all_to_all[54:60]], 2)
cat_2: f64[1, 1, 12, 2] = cat([all_to_all[6:12], all_to_all[24:30], all_to_all[42:48],
    all_to_all[60:66]], 2)
cat_3: f64[1, 1, 12, 2] = cat([all_to_all[12:18], all_to_all[30:36], all_to_all[48:54],
    all_to_all[66:72]], 2)
flash: (f64[1, 1, 12, 2], f64[1, 1, 12]) = flash(cat_1, cat_2, cat_3, scale=1)
cat_4: f64[24] = cat([flash[0][:, :, :3], flash[0][:, :, 3:6], flash[0][:, :, 6:9], flash[0][:, :,
    9:12]])
all_to_all_1: f64[24] = all_to_all(cat_4, receive=[6, 6, 6, 6], send=[6, 6, 6, 6], 'sp')
cat_5: f64[1, 4, 3, 2] = cat([all_to_all_1[:6], all_to_all_1[6:12], all_to_all_1[12:18],
    all_to_all_1[18:24]], 1)
return [cat_5, cat_1, cat_2, cat_3, flash[0], flash[1]]
""",
    )
    check(
        backward,
        """\
cat: f64[24] = cat([dout_1[:, :1], dout_1[:, 1:2], dout_1[:, 2:3], dout_1[:, 3:4]])
all_to_all: f64[24] = all_to_all(cat, receive=[6, 6, 6, 6], send=[6, 6, 6, 6], 'sp')
cat_1: f64[1, 1, 12, 2] = cat([all_to_all[:6], all_to_all[6:12], all_to_all[12:18],
    all_to_all[18:24]], 2)
flash_backward: (f64[1, 1, 12, 2], f64[1, 1, 12, 2], f64[1, 1, 12, 2]) = flash_backward(cat_1,
    q_1, k_1, v_1, out_1, lse_1, 0, False, scale=1)
add: f64[1, 1, 12, 2] = add(0, flash_backward[0])
cat_2: f64[72] = cat([add[:, :, :3], flash_backward[1][:, :, :3], flash_backward[2][:, :, :3],
    add[:, :, 3:6], flash_backward[1][:, :, 3:6], flash_backward[2][:, :, 3:6], add[:, :, 6:9],
    flash_backward[1][:, :, 6:9], flash_backward[2][:, :, 6:9], add[:, :, 9:12],
    flash_backward[1][:, :, 9:12], flash_backward[2][:, :, 9:12]])
all_to_all_1: f64[72] = all_to_all(cat_2, receive=[18, 18, 18, 18], send=[18, 18, 18, 18], 'sp')
cat_3: f64[1, 4, 3, 2] = cat([all_to_all_1[:6], all_to_all_1[18:24], all_to_all_1[36:42],
    all_to_all_1[54:60]], 1)
cat_4: f64[1, 4, 3, 2] = cat([all_to_all_1[6:12], all_to_all_1[24:30], all_to_all_1[42:48],
    all_to_all_1[60:66]], 1)
cat_5: f64[1, 4, 3, 2] = cat([all_to_all_1[12:18], all_to_all_1[30:36], all_to_all_1[48:54],
    all_to_all_1[66:72]], 1)
return [cat_3, cat_4, cat_5]
""",
    )


def test_hierarchical(check):
    check(
        told(chosen(Hierarchical(2))),
        """\
keys 1   0 1      | 1 0      | 2 3      | 3 2
keys 2   2 3      | 3 2      | 0 1      | 1 0
""",
    )
    forward, backward = listings(chosen(Hierarchical(2)))
    check(
        forward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all: f64[3, 16] = shift(cat, to=3, from=3, 'sp')
all_to_all_1: f64[3, 16] = shift(cat, to=0, from=0, 'sp')
cat_1: f64[1, 4, 6, 2] = cat([all_to_all_1[:, :8], k_1], 2)
cat_2: f64[1, 4, 6, 2] = cat([all_to_all_1[:, 8:16], v_1], 2)
flash: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, cat_1, cat_2, scale=1)
cat_3: f64[3, 16] = cat([all_to_all[:, :8], all_to_all[:, 8:16]], 1)
all_to_all_2: f64[3, 16] = shift(cat_3, to=0, from=0, 'sp')
cat_4: f64[1, 4, 6, 2] = cat([all_to_all_2[:, :8], all_to_all[:, :8]], 2)
cat_5: f64[1, 4, 6, 2] = cat([all_to_all_2[:, 8:16], all_to_all[:, 8:16]], 2)
flash_1: (f64[1, 4, 3, 2], f64[1, 4, 3]) = flash(q_1, cat_4, cat_5, scale=1)
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3] = fused[maximum eq .. 17 ops](flash, flash_1)
return [add_1, q_1, k_1, v_1, add_1, add_2]
""",
    )
    check(
        backward,
        """\
cat: f64[3, 16] = cat([k_1, v_1], 1)
all_to_all: f64[3, 16] = shift(cat, to=3, from=3, 'sp')
all_to_all_1: f64[3, 16] = shift(cat, to=0, from=0, 'sp')
cat_1: f64[1, 4, 6, 2] = cat([all_to_all_1[:, :8], k_1], 2)
cat_2: f64[1, 4, 6, 2] = cat([all_to_all_1[:, 8:16], v_1], 2)
flash_backward: (f64[1, 4, 3, 2], f64[1, 4, 6, 2], f64[1, 4, 6, 2]) = flash_backward(dout_1, q_1,
    cat_1, cat_2, out_1, lse_1, 0, False, scale=1)
add: f64[1, 4, 3, 2] = add(0, flash_backward[0])
cat_3: f64[3, 16] = cat([flash_backward[1][:, :, :3], flash_backward[2][:, :, :3]], 1)
all_to_all_2: f64[3, 16] = shift(cat_3, to=0, from=0, 'sp')
add_1: f64[1, 4, 3, 2], add_2: f64[1, 4, 3, 2] = fused[add add](all_to_all_2[:, :8],
    flash_backward[1][:, :, 3:6], all_to_all_2[:, 8:16], flash_backward[2][:, :, 3:6])
cat_4: f64[3, 16] = cat([all_to_all[:, :8], all_to_all[:, 8:16]], 1)
all_to_all_3: f64[3, 16] = shift(cat_4, to=0, from=0, 'sp')
cat_5: f64[1, 4, 6, 2] = cat([all_to_all_3[:, :8], all_to_all[:, :8]], 2)
cat_6: f64[1, 4, 6, 2] = cat([all_to_all_3[:, 8:16], all_to_all[:, 8:16]], 2)
flash_backward_1: (f64[1, 4, 3, 2], f64[1, 4, 6, 2], f64[1, 4, 6, 2]) = flash_backward(dout_1,
    q_1, cat_5, cat_6, out_1, lse_1, 0, False, scale=1)
add_3: f64[1, 4, 3, 2] = add(add, flash_backward_1[0])
cat_7: f64[3, 16] = cat([flash_backward_1[1][:, :, :3], flash_backward_1[2][:, :, :3]], 1)
all_to_all_4: f64[3, 16] = shift(cat_7, to=0, from=0, 'sp')
add_4: f64[1, 4, 3, 2], add_5: f64[1, 4, 3, 2] = fused[add add](all_to_all_4[:, :8],
    flash_backward_1[1][:, :, 3:6], all_to_all_4[:, 8:16], flash_backward_1[2][:, :, 3:6])
cat_8: f64[3, 16] = cat([add_4, add_5], 1)
all_to_all_5: f64[3, 16] = shift(cat_8, to=3, from=3, 'sp')
add_6: f64[1, 4, 3, 2], add_7: f64[1, 4, 3, 2] = fused[add add](add_1, all_to_all_5[:, :8], add_2,
    all_to_all_5[:, 8:16])
return [add_3, add_6, add_7]
""",
    )


def test_composed(check):
    check(
        told(chosen(Composed(Ulysses(mesh="h"), AllGather(mesh="s")))),
        """\
heads    0+2      | 1+3      | 0+2      | 1+3
keys 1   0+2 1+3  | 1+3 0+2  | 0+2 1+3  | 1+3 0+2
""",
    )
    forward, backward = listings(chosen(Composed(Ulysses(mesh="h"), AllGather(mesh="s"))))
    check(
        forward,
        """\
cat: f64[72] = cat([q_1[:, :2], k_1[:, :2], v_1[:, :2], q_1[:, 2:4], k_1[:, 2:4], v_1[:, 2:4]])
all_to_all: f64[72] = all_to_all(cat, receive=[0, 36, 0, 36], send=[0, 36, 0, 36], 'sp')
cat_1: f64[1, 2, 6, 2] = cat([all_to_all[:12], all_to_all[36:48]], 2)
cat_2: f64[1, 2, 6, 2] = cat([all_to_all[12:24], all_to_all[48:60]], 2)
cat_3: f64[1, 2, 6, 2] = cat([all_to_all[24:36], all_to_all[60:72]], 2)
cat_4: f64[6, 8] = cat([cat_2, cat_3], 1)
all_to_all_1: f64[6, 8] = shift(cat_4, to=0, from=0, 'sp')
cat_5: f64[1, 2, 12, 2] = cat([all_to_all_1[:, :4][:, :, :3], cat_2[:, :, :3], all_to_all_1[:,
    :4][:, :, 3:6], cat_2[:, :, 3:6]], 2)
cat_6: f64[1, 2, 12, 2] = cat([all_to_all_1[:, 4:8][:, :, :3], cat_3[:, :, :3], all_to_all_1[:,
    4:8][:, :, 3:6], cat_3[:, :, 3:6]], 2)
flash: (f64[1, 2, 6, 2], f64[1, 2, 6]) = flash(cat_1, cat_5, cat_6, scale=1)
cat_7: f64[24] = cat([flash[0][:, :, :3], flash[0][:, :, 3:6]])
all_to_all_2: f64[24] = all_to_all(cat_7, receive=[0, 12, 0, 12], send=[0, 12, 0, 12], 'sp')
cat_8: f64[1, 4, 3, 2] = cat([all_to_all_2[:12], all_to_all_2[12:24]], 1)
return [cat_8, cat_1, cat_2, cat_3, flash[0], flash[1]]
""",
    )
    check(
        backward,
        """\
cat: f64[24] = cat([dout_1[:, :2], dout_1[:, 2:4]])
all_to_all: f64[24] = all_to_all(cat, receive=[0, 12, 0, 12], send=[0, 12, 0, 12], 'sp')
cat_1: f64[1, 2, 6, 2] = cat([all_to_all[:12], all_to_all[12:24]], 2)
cat_2: f64[6, 8] = cat([k_1, v_1], 1)
all_to_all_1: f64[6, 8] = shift(cat_2, to=0, from=0, 'sp')
cat_3: f64[1, 2, 12, 2] = cat([all_to_all_1[:, :4][:, :, :3], k_1[:, :, :3], all_to_all_1[:,
    :4][:, :, 3:6], k_1[:, :, 3:6]], 2)
cat_4: f64[1, 2, 12, 2] = cat([all_to_all_1[:, 4:8][:, :, :3], v_1[:, :, :3], all_to_all_1[:,
    4:8][:, :, 3:6], v_1[:, :, 3:6]], 2)
flash_backward: (f64[1, 2, 6, 2], f64[1, 2, 12, 2], f64[1, 2, 12, 2]) = flash_backward(cat_1, q_1,
    cat_3, cat_4, out_1, lse_1, 0, False, scale=1)
add: f64[1, 2, 6, 2] = add(0, flash_backward[0])
cat_5: f64[1, 2, 6, 2] = cat([flash_backward[1][:, :, :3], flash_backward[1][:, :, 6:9]], 2)
cat_6: f64[1, 2, 6, 2] = cat([flash_backward[2][:, :, :3], flash_backward[2][:, :, 6:9]], 2)
cat_7: f64[6, 8] = cat([cat_5, cat_6], 1)
all_to_all_2: f64[6, 8] = shift(cat_7, to=0, from=0, 'sp')
cat_8: f64[1, 2, 6, 2] = cat([flash_backward[1][:, :, 3:6], flash_backward[1][:, :, 9:12]], 2)
cat_9: f64[1, 2, 6, 2] = cat([flash_backward[2][:, :, 3:6], flash_backward[2][:, :, 9:12]], 2)
add_1: f64[1, 2, 6, 2], add_2: f64[1, 2, 6, 2] = fused[add add](all_to_all_2[:, :4], cat_8,
    all_to_all_2[:, 4:8], cat_9)
cat_10: f64[72] = cat([add[:, :, :3], add_1[:, :, :3], add_2[:, :, :3], add[:, :, 3:6], add_1[:,
    :, 3:6], add_2[:, :, 3:6]])
all_to_all_3: f64[72] = all_to_all(cat_10, receive=[0, 36, 0, 36], send=[0, 36, 0, 36], 'sp')
cat_11: f64[1, 4, 3, 2] = cat([all_to_all_3[:12], all_to_all_3[36:48]], 1)
cat_12: f64[1, 4, 3, 2] = cat([all_to_all_3[12:24], all_to_all_3[48:60]], 1)
cat_13: f64[1, 4, 3, 2] = cat([all_to_all_3[24:36], all_to_all_3[60:72]], 1)
return [cat_11, cat_12, cat_13]
""",
    )


def test_split_kv(check):
    check(
        told(SPLIT_KV),
        """\
keys 1   0        | 1        | 2        | 3
""",
    )
    forward, backward = listings(SPLIT_KV)
    check(
        forward,
        """\
flash: (f64[1, 4, 12, 2], f64[1, 4, 12]) = flash(q_1, k_1, v_1, scale=1)
all_reduce: f64[1, 4, 12] = all_reduce(flash[1], 'max', 'sp')
where: f64[1, 4, 12], exp: f64[1, 4, 12], mul: f64[1, 4, 12, 2] = fused[eq where .. 5
    ops](all_reduce, flash)
cat: f64[1, 4, 12, 3] = cat([mul, exp], -1)
all_reduce_1: f64[1, 4, 12, 3] = all_reduce(cat, 'sum', 'sp')
split_with_sizes: (f64[1, 4, 12, 2], f64[1, 4, 12, 1]) = split_with_sizes(all_reduce_1, [2, 1],
    -1)
div: f64[1, 4, 12, 2], add: f64[1, 4, 12] = fused[eq where .. 5 ops](split_with_sizes, where)
return [div, q_1, k_1, v_1, div, add]
""",
    )
    check(
        backward,
        """\
flash_backward: (f64[1, 4, 12, 2], f64[1, 4, 3, 2], f64[1, 4, 3, 2]) = flash_backward(dout_1, q_1,
    k_1, v_1, out_1, lse_1, 0, False, scale=1)
add: f64[1, 4, 12, 2] = add(0, flash_backward[0])
all_reduce: f64[1, 4, 12, 2] = all_reduce(add, 'sum', 'sp')
return [all_reduce, flash_backward[1], flash_backward[2]]
""",
    )


def test_readme_has_the_table():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"<!-- methods -->\n{methods_table()}\n<!-- methods end -->" in text, (
        "put what `python -m mosaic methods` prints between the two markers"
    )
