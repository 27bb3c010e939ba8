"""The README's table of methods: words for each, and volumes that ``cost_of`` computes."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic.api.methods import (
    AllGather,
    Composed,
    Hierarchical,
    Local,
    Mesh2D,
    Method,
    Ring,
    Ulysses,
)
from mosaic.attention.cost import cost_of
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import Machine, strategy_of
from mosaic.layout import Layout

RANKS = 8
CUT = Layout.even(8192, RANKS)
EXAMPLE = AttentionProblem(CUT, CUT, 1, 32, 8, 128, 128, itemsize=2)


@dataclass(frozen=True)
class Row:
    """``written``: as in a spec. The rest: what is cut, what a rank sends in forward and in
    backward, what it holds beside its own, and when to use it."""

    written: str
    method: Method
    cuts: str
    forward: str
    backward: str
    held: str
    when: str


ROWS = (
    Row(
        '`"ring"`, `Ring(stages=k)`',
        Ring(stages=8),
        "queries, keys",
        "(p-1) kv",
        "twice",
        "3 portions of (p-1)/(k-1) kv",
        "long axes; more stages, less memory",
    ),
    Row(
        '`"all_gather"`',
        AllGather(),
        "queries, keys",
        "(p-1) kv",
        "twice",
        "p kv, in zigzag 2p kv",
        "short axes, fast links",
    ),
    Row(
        '`"ulysses"`',
        Ulysses(),
        "heads",
        "(p-1)/p (q + out + kv)",
        "the same",
        "2 (q + kv)",
        "heads divide by p: least is sent",
    ),
    Row(
        "`Mesh2D(r, c)`, p = r c",
        Mesh2D(4, 2),
        "tiles of queries x keys",
        "(r-1) kv + (c-1) (q + out)",
        "twice",
        "2r kv + c (q + 2 out)",
        "many ranks, few heads",
    ),
    Row(
        "`Hierarchical(w)`, p = M w",
        Hierarchical(4),
        "queries, keys",
        "(M-1) kv between nodes, M (w-1) kv inside",
        "twice",
        "(3 + 2w) kv",
        "several nodes of w ranks",
    ),
    Row(
        "`Composed(Ulysses, Ring)`, p = u s",
        Composed(Ulysses(mesh="u"), Ring(stages=2, mesh="s")),
        "heads, then queries and keys",
        "(u-1)/u (q + out + kv) + (s-1) kv",
        "keys twice",
        "both",
        "fewer heads than ranks",
    ),
    Row('`"local"`', Local(), "nothing", "0", "0", "0", "the other axes of a spec"),
)


def methods_table() -> str:
    """Markdown. The last column is for 8 ranks, and 32 heads that share 8 KV heads."""
    head = "| method | cuts | sent forward | backward | held beside | when | e.g. |"
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *map(line, ROWS)])


def line(row: Row) -> str:
    strategy, _ = strategy_of(row.method, EXAMPLE, Machine(sizes=(("u", 4), ("s", 2))))
    cost = cost_of(strategy, EXAMPLE)
    q = CUT.n / RANKS * EXAMPLE.heads * EXAMPLE.dim * EXAMPLE.itemsize
    example = f"{cost.forward / q:.3g}, {cost.backward / q:.3g}"
    words = (row.written, row.cuts, row.forward, row.backward, row.held, row.when, example)
    return f"| {' | '.join(words)} |"
