"""What a way of attention costs: the one home of the formulas (research/attention.md 4.7).

All are for even shards of one attention, in bytes that one rank sends, with

    q     one rank's queries, out its output (as many bytes as q where head dims are equal)
    kv    its keys and values; after an exchange of heads those of its heads, of a longer shard
    lse   its log-sum-exp, float32 (float64 for float64)
    u     ranks that exchange sequence for heads
    R, C  rows and columns of the grid of nodes; r, c of the grid inside a node

    forward   heads    (u - 1) / u (q + out) + (u - 1) / max(u, kv_heads) kv... see ``_exchange``
              keys     (R - 1) kv between nodes, R (r - 1) kv inside
              queries  (C c - 1) (q + out + lse)
    backward  heads    the same (dout there; dq, dk, dv back)
              keys     the same twice, for K and V and for their gradients
              queries  (C c - 1) (2 q + 2 out + lse): q, out, dout, lse there; dq back
    split-KV  two all-reduces: the largest lse; output and weight. Backward: of dq
"""

from __future__ import annotations

from dataclasses import dataclass

from mosaic.attention.way import Way


@dataclass(frozen=True)
class Shape:
    """One attention at its global size. ``area``: the share of query-key pairs that is computed."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    v_dim: int
    itemsize: int
    area: float = 1.0

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values."""
        dims = self.dim + self.v_dim
        return self.batch * self.keys * self.kv_heads * dims * self.itemsize

    @property
    def flops(self) -> float:
        """Of the forward; the backward has 2.5 times as many."""
        pairs = self.batch * self.heads * self.queries * self.keys * self.area
        return 2 * pairs * (self.dim + self.v_dim)


@dataclass(frozen=True)
class Cost:
    """Of one attention on one of p ranks.

    forward, backward: bytes sent. between: the part of ``forward`` that goes between nodes.
    memory: bytes held beside its own shards in forward, at the most. merges: how often partial
    outputs are joined. sends: collectives in forward.
    """

    forward: float
    backward: float
    between: float
    memory: float
    merges: int
    sends: int


def cost_of(way: Way, shape: Shape, p: int) -> Cost:
    if way.everywhere:
        return _split_kv(shape, p)
    if way.ranks == 1:
        return Cost(0, 0, 0, 0, 0, 0)
    u, inter, intra = way.heads, way.inter, way.intra
    q, out, kv, lse = _shards(shape, p)
    exchanged, kv_there = _exchange(shape, u, q, kv, out)
    rows, others = inter.rows * intra.rows, inter.cols * intra.cols - 1
    between = (inter.rows - 1) * kv_there
    keys = between + inter.rows * (intra.rows - 1) * kv_there
    stops = _stops(inter.stages) * _stops(intra.stages)
    visiting = min(rows, 2 * -(-rows // stops)) if stops > 1 else rows
    return Cost(
        forward=exchanged + keys + others * (q + out + lse),
        backward=exchanged + 2 * keys + others * (2 * q + 2 * out + lse),
        between=between + (inter.cols - 1) * (intra.cols) * (q + out + lse),
        memory=(q + kv_there + out) * (u > 1) + visiting * kv_there + others * (q + out + lse),
        merges=stops - 1 + others,
        sends=2 * (u > 1) + (stops if rows > 1 else 0) - (stops > 1) + 2 * (others > 0),
    )


def _shards(shape: Shape, p: int) -> tuple[float, float, float, float]:
    """Bytes of one rank's q, out, kv and lse."""
    rows = shape.batch * shape.queries / p * shape.heads
    keys = shape.batch * shape.keys / p * shape.kv_heads
    e = shape.itemsize
    return (
        rows * shape.dim * e,
        rows * shape.v_dim * e,
        keys * (shape.dim + shape.v_dim) * e,
        rows * max(4, e),
    )


def _exchange(shape: Shape, u: int, q: float, kv: float, out: float) -> tuple[float, float]:
    """Bytes sent to exchange sequence for heads and back, and K and V of a rank afterwards. KV
    heads that are fewer than u go to several ranks."""
    if u == 1:
        return 0, kv
    copies = max(1, u // shape.kv_heads)
    return (u - 1) / u * (q + out + copies * kv), copies * kv


def _stops(stages: int) -> int:
    return max(1, stages)


def _split_kv(shape: Shape, p: int) -> Cost:
    e = max(4, shape.itemsize)
    rows = shape.batch * shape.heads * shape.queries
    share = 2 * (p - 1) / p
    forward = share * rows * (shape.v_dim + 2) * e
    return Cost(forward, share * rows * shape.dim * e, 0, rows * (shape.v_dim + 2) * e, 1, 2)
