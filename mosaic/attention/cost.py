"""What a strategy of attention costs: the one home of the formulas.

Bytes that one of p ranks sends for one attention, with even shards. In them

    q, out   one rank's queries and its output      u      ranks that exchange sequence for heads
    kv       its keys and values together           R, C   rows and columns of the grid of nodes
    lse      its log-sum-exp, float32 (or 64)       r, c   of the grid inside a node
    KV       kv after heads were exchanged: as many bytes, or u / kv_heads times as many where KV
             heads are fewer than u and go to several ranks

    what travels    forward                             backward
    heads           (u - 1) / u (q + out + KV)          the same: dout there; dq, dK and dV back
    keys, inside    R (r - 1) KV                        twice: K and V again, dK and dV home
    keys, between   (R - 1) KV                          twice
    queries         (C c - 1) (q + out + lse)           (C c - 1) (2 q + 2 out + lse)
    split-KV        two all-reduces: the largest lse    one all-reduce: dq
                    of each row; output and weight

dK and dV go straight home from each rank, p - 1 times; passed on round a ring they would travel p
times. Queries on a grid: q there, out and lse home; in backward q, out, dout and lse there, as
kernels take ``out`` and not its product with dout, and dq home. ``Ring(grad_dtype=...)`` scales dK
and dV. Of a mask that is known when compiling (a window, fixed blocks) it is counted how many keys
the busiest rank sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from mosaic.attention.blocks import FULL, Band
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.route import route_of, rows_sent, wanted_by
from mosaic.attention.schedule import portions
from mosaic.attention.strategy import Level, Strategy
from mosaic.layout import Layout

#: Bytes (inside a node, between nodes).
Pair = tuple[float, float]
#: Up to so many ranks it is counted what each of them sends: every hop has as many.
COUNTED = 128
#: Bytes of a number, for the dtypes in which dK and dV may travel.
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """Of one attention on one of p ranks.

    forward, backward: bytes sent. between: the part of ``forward`` that leaves the node.
    memory: bytes that forward holds at once beside inputs and outputs, at the most: what is sent,
        what arrives, and what arrived put in order; without the work space of kernels.
    merges: how often partial outputs are joined. sends: collectives in forward.
    """

    forward: float = 0
    backward: float = 0
    between: float = 0
    memory: float = 0
    merges: int = 0
    sends: int = 0


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank: its queries, output and log-sum-exp, and its keys and values (after heads
    were exchanged)."""

    q: float
    out: float
    lse: float
    kv: float

    @classmethod
    def of(cls, strategy: Strategy, x: AttentionProblem) -> Parts:
        rows = x.batch * x.query.n / x.p * x.heads
        copies = max(1, strategy.heads // x.kv_heads)
        lse = rows * max(4, x.itemsize)
        q, out = rows * x.dim * x.itemsize, rows * x.v_dim * x.itemsize
        return cls(q, out, lse, x.kv_bytes / x.p * copies)


@dataclass(frozen=True)
class Sent:
    """What one rank sends in forward, by what travels."""

    heads: Pair
    queries: Pair
    windows: Pair
    steps: Pair

    @classmethod
    def of(cls, strategy: Strategy, x: AttentionProblem, node_size: int = 0) -> Sent:
        """The ranks of a group lie ``apart``; so many of them share a node."""
        parts, inter, intra = Parts.of(strategy, x), strategy.inter, strategy.intra
        node_size = node_size or x.p

        def near(count: int, apart: int) -> int:
            return min(count, max(1, node_size // apart))

        u = 1 if strategy.is_outer else strategy.heads
        heads = near(strategy.heads, inter.size * intra.size if strategy.is_outer else 1)
        columns = near(inter.cols, u * intra.size) * near(intra.cols, u)
        nodes = near(inter.rows, u * inter.cols * intra.size)
        rows = near(intra.rows, u * intra.cols)
        seen = shares_sent(strategy, x)
        in_window = seen.steps * inter.rows * parts.kv
        return cls(
            heads=_pair(strategy.heads, heads, (parts.q + parts.out + parts.kv) / strategy.heads),
            queries=_pair(inter.cols * intra.cols, columns, parts.q + parts.out + parts.lse),
            windows=_pair(inter.rows, nodes, seen.windows * parts.kv),
            steps=_pair(intra.rows, rows, in_window),
        )


class Shares(NamedTuple):
    """Of all keys that would be sent those that are: between nodes, and inside them."""

    windows: float = 1
    steps: float = 1


def shares_sent(strategy: Strategy, x: AttentionProblem) -> Shares:
    """On the busiest rank. Of more ranks than are worth counting, by the length of a window."""
    inter, intra, length = strategy.inter, strategy.intra, x.band.length
    if x.p <= COUNTED and (x.band != FULL or x.seen is not None):
        seen = None if x.seen is None else x.seen.layout(x.query)
        return _counted(strategy, x.query, x.key, x.band, seen)
    if length is None or inter.size > 1 or intra.rows == 1:
        return Shares()
    return Shares(1, min(1, length * x.p / x.key.n / (intra.rows - 1)))


@lru_cache(maxsize=256)
def _counted(
    strategy: Strategy, query: Layout, key: Layout, band: Band, seen: Layout | None
) -> Shares:
    plan = AttentionPlan(strategy, 0, "", query, key, band, seen=seen)
    plan = plan.after_heads(strategy.heads) if 1 < strategy.heads < key.p else plan
    if wanted_by(plan) is None:
        return Shares()
    stops = route_of(plan).stops
    between = rows_sent(dict.fromkeys(stop.window for stop in stops), plan.p)
    inside = rows_sent((stop.step for stop in stops), plan.p)
    windows, steps = max(zip(between, inside, strict=True), key=sum)
    each = key.n / plan.p
    all_windows = (strategy.inter.rows - 1) * each
    all_steps = strategy.inter.rows * (strategy.intra.rows - 1) * each
    return Shares(windows / max(all_windows, 1), steps / max(all_steps, 1))


def _pair(count: int, near: int, size: float) -> Pair:
    """To all others of ``count`` ranks, of whom ``near`` share the node."""
    return (near - 1) * size, (count - near) * size


def cost_of(strategy: Strategy, problem: AttentionProblem, node_size: int = 0) -> Cost:
    """``node_size``: how many neighbouring ranks share a node; 0 is all."""
    if strategy.everywhere:
        return _split_kv(problem)
    if strategy.ranks == 1:
        return Cost()
    parts, sent = Parts.of(strategy, problem), Sent.of(strategy, problem, node_size)
    heads, queries = sum(sent.heads), sum(sent.queries)
    keys = sum(sent.windows) + sum(sent.steps)
    again = 1 + (parts.q + parts.out) / (parts.q + parts.out + parts.lse)
    grids = strategy.inter.cols * strategy.intra.cols > 1
    return Cost(
        forward=heads + keys + queries,
        backward=heads + keys * (1 + home_factor(strategy, problem)) + queries * again,
        between=sum(pair[1] for pair in (sent.heads, sent.queries, sent.windows, sent.steps)),
        memory=_memory(strategy, parts),
        merges=strategy.inter.stages * strategy.intra.stages - 1 + grids,
        sends=2 * (strategy.heads > 1) + _sends(strategy.inter, strategy.intra) + 3 * grids,
    )


def home_factor(strategy: Strategy, problem: AttentionProblem) -> float:
    """Bytes of dK and dV on their way home, by those of K and V."""
    return ITEMSIZE.get(strategy.grad_dtype, problem.itemsize) / problem.itemsize


def _sends(inter: Level, intra: Level) -> int:
    """Hops of keys: between nodes, and in each window inside the node. An own chunk needs none."""
    windows, steps = (sum(set(back) != {0} for back in portions(level)) for level in (inter, intra))
    return windows + inter.stages * steps


def _memory(strategy: Strategy, parts: Parts) -> float:
    window, step = _held(strategy.inter), _held(strategy.intra)
    visits = (window + step * max(map(len, portions(strategy.inter)))) * parts.kv
    gathered = strategy.inter.cols * strategy.intra.cols
    queries = gathered * (parts.q + 2 * (parts.out + parts.lse)) if gathered > 1 else 0
    if strategy.heads == 1:
        return visits + queries
    return parts.q + parts.kv + max(parts.q + parts.kv, visits + queries)


def _held(level: Level) -> int:
    """Chunks. All at once: as they arrive, and put in order. In portions: one is attended to while
    the next is sent and arrives; of two, nothing comes behind the second."""
    if level.rows == 1:
        return 0
    if level.stages <= 2:
        return 2 * level.rows - (level.stages == 2)
    return 3 * max(map(len, portions(level)))


def _split_kv(x: AttentionProblem) -> Cost:
    e = max(4, x.itemsize)
    rows = x.batch * x.heads * x.query.n
    share = 2 * (x.p - 1) / x.p
    forward = share * rows * (x.v_dim + 2) * e
    return Cost(forward, share * rows * x.dim * e, 0, 2 * rows * (x.v_dim + 2) * e, 1, 2)


def size(n: float) -> str:
    """Bytes as they are read: ``31.2 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
