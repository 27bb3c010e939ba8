"""Scaled dot product attention: free along batch and heads, a method along the attended axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import torch

from mosaic.attention.blocks import Band, pieces
from mosaic.attention.cost import Shape
from mosaic.layout import Layout, Place
from mosaic.local.views import viewed
from mosaic.masks.op import PLAIN
from mosaic.masks.words import band_of, documents_of, mask_words
from mosaic.sharder import Sharder
from mosaic.values import Call, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """What was decided about one attention: global facts only, on every rank the same."""

    axis: str  # the sharded axis when it attends over it, "" when another dim is attended over
    method: str
    query: Layout
    key: Layout
    band: Band
    documents: bool
    mask: str  # in words, for the plan
    scale: float
    dropout: float
    site: int
    batch: Place | None  # where the sharded axis sits in the folded batch dim, or in the heads
    heads: Place | None
    shape: Shape
    has_rows: bool  # a mask with a row for each query

    @property
    def flops(self) -> float:
        return self.shape.flops

    @property
    def is_distributed(self) -> bool:
        return bool(self.axis)

    @property
    def causal(self) -> bool:
        return self.band[1] == 0

    @property
    def is_window(self) -> bool:
        """Whether what a query sees is no longer than a shard: even shards then work alike."""
        left, right = self.band
        return left is not None and right is not None and left + right < self.key.n / self.key.p


def scaled_dot_product_attention(s: Sharder, c: Call) -> Value:
    """Batches and heads are free; along the attended axis by a method."""
    c = unbroadcast(s, c)
    if all(v.place is None for v in c.tensors()):
        return whole(s, c)
    q = c["query"]
    if q.place is None or q.place.dim < q.ndim - 2:
        return over_other_dim(s, c, q.place)
    place = q.place.refined()
    if place.dim == q.ndim - 1 or (place.outer, place.inner) != (1, 1):
        return gathered(s, c, "cuts the head dim or a part of the attended dim")
    k, v, keys = with_keys(s, c, place)
    method = s.axis.method if k.place else "local"
    mask = c["attn_mask"]
    if mask is not None:
        rows = mask.ndim >= 2 and mask.shape[-2] == q.shape[-2] != 1
        mask = s.at(mask, place.at(mask.ndim - 2)) if rows else s.gather(mask, "a mask of keys")
    q = s.at(q, place)
    found = attention(s, c, method, place.layout, keys, None)
    ids = (s.gather(x, "every rank has all documents") for x in documents_of(c))
    return marked(s, c, found, place, (q, k, v, mask, *ids))


def unbroadcast(s: Sharder, c: Call) -> Call:
    """Batches as long as the result's (a method may not broadcast them), and a mask of two dims."""
    changed = {}
    lead = list(c.val.shape[: -3 if c.val.ndim > 3 else -2])
    for name in ("query", "key", "value"):
        x = c[name]
        heads = [x.shape[-3] if x.ndim > 2 else 1] if c.val.ndim > 3 else []
        if name == "query" and heads:
            heads = [c.val.shape[-3]]
        want = [*lead, *heads, *x.shape[-2:]]
        if list(x.shape) != want:
            changed[name] = s.call(c, aten.expand.default, x, want)
    mask = c["attn_mask"]
    if mask is not None and mask.ndim < 2:
        changed["attn_mask"] = s.call(c, aten.unsqueeze.default, mask, 0)
    return c.replaced(changed)


def gathered(s: Sharder, c: Call, reason: str) -> Value:
    """Whole on every rank, and with dropout every rank must drop the same elements."""
    c = s.with_whole_operands(c, reason)
    return whole(s, c)


def whole(s: Sharder, c: Call) -> Value:
    if is_plain(c):
        return s.emit(c, None, enter=False)
    c = unbroadcast(s, c)
    query, key = (Layout.whole(c[n].shape[-2], s.axis.p) for n in ("query", "key"))
    found = attention(s, c, "local", query, key, None)
    place = Place(query, c.val.ndim - 2)
    operands = tuple(c[n] for n in ("query", "key", "value", "attn_mask"))
    out = marked(s, c, found, place, (*operands, *documents_of(c)), enter=False)
    return Value(out.val, None, out.node)


def is_plain(c: Call) -> bool:
    """Whether ATen's op does it: equal dropout on every rank and a mask in words need ours."""
    return c.target is PLAIN and not c["dropout_p"]


def with_keys(s: Sharder, c: Call, place: Place) -> tuple[Value, Value, Layout]:
    """Keys and values sharded alike along their own axis, or whole."""
    k, v = c["key"], c["value"]
    have = next((x.place.refined() for x in (k, v) if x.place), None)
    if have and have.dim == k.ndim - 2 and (have.outer, have.inner) == (1, 1):
        return s.at(k, have), s.at(v, have), have.layout
    why = "whole keys meet sharded queries"
    return s.gather(k, why), s.gather(v, why), Layout.whole(k.shape[-2], place.layout.p)


def over_other_dim(s: Sharder, c: Call, place: Place | None) -> Value:
    """The sharded axis is a batch or head dim of the queries (or no dim of them): local."""
    q, k, v, mask = c["query"], c["key"], c["value"], c["attn_mask"]
    if place is None:
        return gathered(s, c, "has whole queries and sharded keys")
    from_end = q.ndim - place.dim
    if any(x.ndim < from_end or x.shape[-from_end] != q.shape[place.dim] for x in (k, v)):
        return gathered(s, c, "has fewer heads or batches of keys than of queries")
    q = s.at(q, place)
    k, v = (s.at(x, place.at(x.ndim - from_end)) for x in (k, v))
    if mask is not None:
        cut = mask.ndim >= from_end and mask.shape[-from_end] == q.shape[place.dim]
        mask = s.at(mask, place.at(mask.ndim - from_end)) if cut else s.gather(mask, "is broadcast")
    ids = documents_of(c)
    cut = place.dim == 0 and all(x.shape[0] == q.shape[0] for x in ids)
    ids = tuple(s.at(x, place) if cut else s.gather(x, "is broadcast") for x in ids)
    whole = [Layout.whole(x.shape[-2], s.axis.p) for x in (q, k)]
    found = attention(s, c, "local", whole[0], whole[1], place)
    # A plain attention of an empty shard loses its gradients, and with them their collectives.
    if is_plain(c) and all(place.layout.lengths):
        s.attentions.append((found, c))
        return s.emit(c, place, query=q, key=k, value=v, attn_mask=mask)
    return marked(s, c, found, place, (q, k, v, mask, *ids))


def attention(
    s: Sharder, c: Call, method: str, query: Layout, key: Layout, cut: Place | None
) -> Attention:
    q, v, mask = c["query"], c["value"], c["attn_mask"]
    band, documents = band_of(c), bool(documents_of(c))
    heads = cut if cut and cut.dim == q.ndim - 3 and q.ndim > 3 else None
    return Attention(
        axis="" if cut else s.axis.name,
        method=method,
        query=query,
        key=key,
        band=band,
        documents=documents,
        mask=mask_words(band, documents, None if mask is None else mask.val),
        scale=1 / math.sqrt(q.shape[-1]) if c["scale"] is None else float(c["scale"]),
        dropout=float(c["dropout_p"]),
        site=s.site(c.like) if c["dropout_p"] else 0,  # equal layers are then traced once
        batch=folded(cut, q.shape) if cut and not heads else None,
        heads=heads,
        shape=Shape(
            batch=prod(q.shape[:-3] if q.ndim > 3 else q.shape[:-2]),
            heads=q.shape[-3] if q.ndim > 3 else 1,
            kv_heads=v.shape[-3] if q.ndim > 3 else 1,
            queries=query.n,
            keys=key.n,
            dim=q.shape[-1],
            v_dim=v.shape[-1],
            itemsize=v.val.element_size(),
            area=share_seen(band, query.n, key.n),
        ),
        has_rows=mask is not None and mask.shape[-2] > 1,
    )


def share_seen(band: Band, queries: int, keys: int) -> float:
    """Of all pairs of a query and a key."""
    seen = sum(piece.area for piece in pieces([(0, queries)], [(0, keys)], band))
    return seen / (queries * keys) if seen else 0.0


def folded(place: Place, shape: torch.Size) -> Place:
    """The place in ``(batch, heads, seq, head_dim)``, where all leading dims are one batch."""
    if len(shape) == 3:
        return place
    out = viewed(place, shape, torch.Size([prod(shape[:-3]), *shape[-3:]]))
    assert out is not None
    return out


def marked(
    s: Sharder, c: Call, found: Attention, place: Place, operands: tuple, enter: bool = True
) -> Value:
    """The node stays an SDPA, with its decision on it: ``rewrite_attention`` makes the op.

    ``enter``: every rank has a part of the work, and the gradients of whole operands are summed.
    """
    s.attentions.append((found, c))
    if not s.writer:
        return Value(c.val, place)
    nodes = [None if x is None else s.operand(x, enter) for x in operands]
    shape = place.local_shape(c.val.shape, s.writer.rank)
    meta = {
        "attention": found,
        "way": c.like.meta.get("way"),
        "seed": s.dropout_seed(c) if found.dropout else None,
    }
    return Value(c.val, place, s.writer.marked(c.like, aten.scaled_dot_product_attention.default,
                                               nodes, c.val.new_empty(shape), meta))  # fmt: skip
