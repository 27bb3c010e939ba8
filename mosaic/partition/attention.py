"""Scaled dot product attention: free along batch and heads, a method along the attended axis."""

from __future__ import annotations

import math
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.api.methods import Auto, Local, Method, method_named
from mosaic.attention.blocks import FULL
from mosaic.attention.dense import is_more, why_dense
from mosaic.attention.kernels.kernel import Case, change_of
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.tiles import adds_bias
from mosaic.graph.source import where
from mosaic.layout import Layout, Place
from mosaic.masks.op import PLAIN, STRUCTURED
from mosaic.masks.words import band_of, documents_of, scores_of, tile_of, words_of
from mosaic.partition.emitter import DECIDED
from mosaic.partition.interpreter import ShardingInterpreter
from mosaic.partition.values import Call, Value, map_values
from mosaic.partition.views import viewed
from mosaic.runtime.world import own_axes

aten = torch.ops.aten
QKV = ("query", "key", "value")
MAKINGS = ("query_documents", "key_documents", "leaves", "sinks", "lse")
#: More intervals than these on a rank, and a causal mask has more pieces than kernels are good for
#: that do not compute it pair by pair.
PIECES = 8


def scaled_dot_product_attention(s: ShardingInterpreter, c: Call) -> Value:
    """Batches and heads are free; along the attended axis by a method."""
    c = unbroadcast(s, c)
    if all(v.place is None for v in c.tensors()):
        return whole(s, c)
    if is_taken(s, c) and any(c[n].place and c[n].cut.dim == c[n].ndim - 2 for n in QKV):
        return gathered(s, c, "attends over two axes, and was planned for one of them")
    q = c["query"]
    if q.place is None:
        return with_whole_queries(s, c)
    if q.cut.dim < q.ndim - 2:
        return over_other_dim(s, c, q.place)
    place = q.cut.refined()
    if place.dim == q.ndim - 1:
        return gathered(s, c, "cuts the head dim")
    rows = place.layout.blocks(place.outer, place.inner)
    has_many = band_of(c.bound) != FULL and max(map(len, rows.ranks)) > PIECES
    if has_many and not is_by_pairs(c):
        return gathered(s, c, "is causal over a dim of which every rank holds many pieces")
    k, v, keys = with_keys(s, c, place)
    method = method_for(s, c) if k.place else Local(mesh=s.axis.mesh_axis)
    mask = c["attn_mask"]
    if mask is not None:
        per_row = mask.ndim >= 2 and mask.shape[-2] == q.shape[-2] != 1
        mask = s.at(mask, place.at(mask.ndim - 2)) if per_row else s.gather(mask, "a mask of keys")
    q = s.at(q, place)
    found = problem(s, c, method, rows, keys, None)
    return marked(s, c, found, place, (q, k, v, mask), whole_makings(s, c))


def method_for(s: ShardingInterpreter, c: Call) -> Method:
    """That which the call names, else that of the axis. Raises ShardingError for one of other
    ranks than the axis is cut over."""
    named = c.bound.get("method")
    if not named or isinstance(method_named(named), (Auto, Local)):
        return s.axis.method
    found = method_named(named)
    if own_axes(found.mesh) != own_axes(s.axis.mesh_axis):
        raise ShardingError(
            f"the attended axis is cut over mesh axis '{s.axis.mesh_axis}', and '{found.mesh}' is "
            "asked for",
            where=where(c.like),
            fix=f"use a method with mesh='{s.axis.mesh_axis}', or leave the method out",
        )
    return found


def makings(c: Call) -> dict[str, Any]:
    """Documents, the leaves of a mask's tiles, sinks, and whether the log-sum-exp is read."""
    return {name: c.bound[name] for name in MAKINGS if c.bound.get(name)}


def whole_makings(s: ShardingInterpreter, c: Call) -> dict[str, Any]:
    """Every rank makes its own part of the mask, of any rows and keys; sinks are of all rows."""
    return map_values(lambda x: s.gather(x, "every rank makes its part of the mask"), makings(c))


def unbroadcast(s: ShardingInterpreter, c: Call) -> Call:
    """Batches as long as the result's (a method may not broadcast them), as many heads of keys as
    of values, and a mask of two dims."""
    changed = {}
    lead = list(c.val.shape[: -3 if c.val.ndim > 3 else -2])
    kv_heads = {c[name].shape[-3] if c[name].ndim > 2 else 1 for name in QKV[1:]}
    for name in QKV:
        x = c[name]
        heads = [x.shape[-3] if x.ndim > 2 else 1] if c.val.ndim > 3 else []
        if name == "query" and heads:
            heads = [c.val.shape[-3]]
        elif heads and len(kv_heads) > 1 and heads[0] not in (0, c.val.shape[-3]):
            x = changed[name] = repeated(s, c, x, c.val.shape[-3] // heads[0])
            heads = [c.val.shape[-3]]
        want = [*lead, *heads, *x.shape[-2:]]
        if list(x.shape) != want:
            changed[name] = s.call(c, aten.expand.default, x, want)
    mask = c["attn_mask"]
    if mask is not None and mask.ndim < 2:
        changed["attn_mask"] = s.call(c, aten.unsqueeze.default, mask, 0)
    return c.replaced(changed)


def repeated(s: ShardingInterpreter, c: Call, x: Value, times: int) -> Value:
    """Every head of keys or values ``times`` times, as ATen repeats them where it groups heads."""
    if x.ndim < 3:
        x = s.call(c, aten.unsqueeze.default, x, 0)
    return s.call(c, aten.repeat_interleave.self_int, x, times, x.ndim - 3)


def gathered(s: ShardingInterpreter, c: Call, reason: str) -> Value:
    """Whole on every rank, and with dropout every rank must drop the same elements."""
    c = s.with_whole_operands(c, reason)
    return whole(s, c)


def whole(s: ShardingInterpreter, c: Call) -> Value:
    if is_left_to_aten(c):
        return s.emit(c, None, enter=False)
    c = unbroadcast(s, c)
    query, key = (Layout.whole(c[n].shape[-2], s.axis.p) for n in ("query", "key"))
    found = replace(problem(s, c, Local(mesh=s.axis.mesh_axis), query, key, None), axes=())
    operands = tuple(c[n] for n in (*QKV, "attn_mask"))
    return marked(s, c, found, None, operands, makings(c), enter=False)


def is_plain(c: Call) -> bool:
    """Whether ATen's op does it: equal dropout on every rank, a mask in words and what another axis
    decided need ours; so do rows of finfo.min that a written-out softmax kept apart from -inf."""
    needs_ours = "attention" in c.like.meta or c.like.meta.get("keeps_low_rows")
    return c.target is PLAIN and not c["dropout_p"] and not needs_ours


def is_left_to_aten(c: Call) -> bool:
    """Not on a GPU: there ATen's op fails with many batches, and its choice among kernels knows
    nothing of short sequences."""
    return is_plain(c) and c.val.device.type != "cuda"


def with_keys(s: ShardingInterpreter, c: Call, place: Place) -> tuple[Value, Value, Layout]:
    """Keys and values sharded alike along their own axis, or whole."""
    k, v = c["key"], c["value"]
    have = next((x.cut.refined() for x in (k, v) if x.place), None)
    if have and have.dim == k.ndim - 2:
        return s.at(k, have), s.at(v, have), have.layout.blocks(have.outer, have.inner)
    why = "is needed whole, since keys and values are not cut alike"
    return s.gather_aloud(k, why), s.gather_aloud(v, why), Layout.whole(k.shape[-2], place.layout.p)


def with_whole_queries(s: ShardingInterpreter, c: Call) -> Value:
    """Keys are cut and queries are not (latents, decoding): each rank attends to its own keys, and
    one merge makes the output whole on every rank (split-KV). So is dq, and q is not entered; of a
    mask each rank gives the gradient of its own columns."""
    q, k, v, mask = c["query"], c["key"], c["value"], c["attn_mask"]
    place = next((x.place for x in (k, v) if x.place), None)
    if place is None or place.dim == k.ndim - 1:
        return gathered(s, c, "has whole queries and a sharded mask or head dim")
    if place.dim < k.ndim - 2:
        if q.shape[place.dim] != k.shape[place.dim]:
            return gathered(s, c, "has fewer heads or batches of keys than of queries")
        return over_other_dim(s, c.replaced({"query": s.at(q, place)}), place)
    k, v, keys = with_keys(s, c, place)
    if mask is not None:
        mask = entered(s, s.gather_aloud(mask, "is a mask of whole queries"))
    query = Layout.whole(q.shape[-2], s.axis.p)
    found = problem(s, c, method_for(s, c), query, keys, None)
    parts = whole_makings(s, c)
    masks = {name: x for name, x in parts.items() if name != "sinks"}  # these see the whole rows
    parts |= map_values(lambda x: entered(s, x), masks)
    return marked(s, c, found, None, (q, k, v, mask), parts, enter=False)


def entered(s: ShardingInterpreter, x: Value) -> Value:
    """A whole value of whose gradient each rank has a part."""
    return Value(x.val, None, s.operand(x, enter=True) if s.emitter else None)


def over_other_dim(s: ShardingInterpreter, c: Call, place: Place) -> Value:
    """The sharded axis is a batch or head dim of the queries: local."""
    q, k, v, mask = c["query"], c["key"], c["value"], c["attn_mask"]
    from_end = q.ndim - place.dim
    if any(x.ndim < from_end or x.shape[-from_end] != q.shape[place.dim] for x in (k, v)):
        return gathered(s, c, "has fewer heads or batches of keys than of queries")
    q = s.at(q, place)
    k, v = (s.at(x, place.at(x.ndim - from_end)) for x in (k, v))
    if mask is not None:
        cut = mask.ndim >= from_end and mask.shape[-from_end] == q.shape[place.dim]
        mask = (
            s.at(mask, place.at(mask.ndim - from_end))
            if cut
            else s.gather_aloud(mask, "is broadcast")
        )
    parts = cut_makings(s, c, place)
    whole = [Layout.whole(x.shape[-2], s.axis.p) for x in (q, k)]
    found = problem(s, c, Local(mesh=s.axis.mesh_axis), whole[0], whole[1], place)
    # A plain attention of an empty shard loses its gradients, and with them their collectives.
    if is_left_to_aten(c) and all(place.layout.lengths):
        s.attentions.append((found, c))
        return s.emit(c, place, query=q, key=k, value=v, attn_mask=mask)
    return marked(s, c, found, place, (q, k, v, mask), parts)


def cut_makings(s: ShardingInterpreter, c: Call, place: Place) -> dict[str, Any]:
    """Cut where the queries' batches or heads are, if they have as many."""
    q = c["query"]
    is_heads = q.ndim > 3 and place.dim == q.ndim - 3
    has_batches = q.ndim <= 4  # of several batch dims no vector can tell

    def cut(x: Value, dim: int) -> Value:
        fits = x.ndim > dim and x.shape[dim] == q.shape[place.dim] and (is_heads or has_batches)
        return s.at(x, place.at(dim)) if fits else s.gather(x, "is broadcast")

    def leaf(x: Value) -> Value:
        is_table = x.ndim < 4
        return s.gather(x, "has no batches") if is_table and not is_heads else cut(x, int(is_heads))

    found = makings(c)
    if "leaves" in found:
        found["leaves"] = [leaf(x) for x in found["leaves"]]
    for name in MAKINGS[:2]:
        if name in found:
            found[name] = s.gather(found[name], "is broadcast") if is_heads else cut(found[name], 0)
    if "sinks" in found:
        sinks = found["sinks"]
        found["sinks"] = cut(sinks, 0) if is_heads else s.gather(sinks, "is broadcast")
    return found


def problem(
    s: ShardingInterpreter, c: Call, method: Method, query: Layout, key: Layout, cut: Place | None
) -> AttentionProblem:
    """What this axis makes of the attention; ``cut``: where it is in q, if not in the rows."""
    q, v, mask = c["query"], c["value"], c["attn_mask"]
    heads = cut if cut and cut.dim == q.ndim - 3 and q.ndim > 3 else None
    words = words_of(c.bound, value_of(mask))
    return AttentionProblem(
        query=query,
        key=key,
        batch=prod(q.shape[:-3] if q.ndim > 3 else q.shape[:-2]),
        heads=q.shape[-3] if q.ndim > 3 else 1,
        kv_heads=v.shape[-3] if q.ndim > 3 else 1,
        dim=q.shape[-1],
        v_dim=v.shape[-1],
        itemsize=v.val.element_size(),
        band=band_of(c.bound),
        documents=bool(documents_of(c.bound)),
        has_rows=mask is not None and mask.shape[-2] > 1,
        tile=tile_of(c.bound),
        scores=scores_of(c.bound),
        mask=words,
        dense=why_dense(words, case_of(c)),
        scale=1 / math.sqrt(q.shape[-1]) if c["scale"] is None else float(c["scale"]),
        dropout=float(c["dropout_p"]),
        site=s.site(c.like) if c["dropout_p"] else 0,  # equal layers are then traced once
        axes=() if cut else (s.axis.name,),
        mesh=s.axis.mesh_axis,
        method=method,
        batch_cut=folded(cut, q.shape) if cut and not heads else None,
        heads_cut=heads,
        seen=c.like.meta.get("seen"),
    )


def value_of(mask: Value | None) -> torch.Tensor | None:
    return None if mask is None else mask.val


def is_by_pairs(c: Call) -> bool:
    """Whether a kernel computes its mask, which is more than a band, pair by pair."""
    said = words_of(c.bound, value_of(c["attn_mask"]))
    return is_more(said, band_of(c.bound)) and not why_dense(said, case_of(c))


def case_of(c: Call) -> Case:
    q, k, v = (c[name].val for name in QKV)
    tile = tile_of(c.bound)
    changes = change_of(scores_of(c.bound), tile if adds_bias(tile) else "")
    return Case.of(q, k, v, None, bool(c["dropout_p"]))._replace(scores=changes)


def folded(place: Place, shape: torch.Size) -> Place:
    """The place in ``(batch, heads, seq, head_dim)``, where all leading dims are one batch."""
    if len(shape) == 3:
        return place
    out = viewed(place, shape, torch.Size([prod(shape[:-3]), *shape[-3:]]))
    assert out is not None
    return out


def marked(
    s: ShardingInterpreter,
    c: Call,
    found: AttentionProblem,
    place: Place | None,
    operands: tuple,
    parts: dict[str, Any],
    enter: bool = True,
) -> Value:
    """The node stays an SDPA, with what its axes make of it: ``rewrite_attention`` makes the op.

    ``operands``: q, k, v and mask; ``parts``: its ``makings``. ``enter``: every rank has a
    part of the work, and the gradients of whole operands are summed.
    """
    s.attentions.append((found, c))
    if not s.emitter:
        return Value(c.val, place)
    args, kwargs = map_values(lambda x: s.operand(x, enter), (operands, parts))
    shape = place.local_shape(c.val.shape, s.emitter.rank) if place else c.val.shape
    if attended_along(c) and found.axes:  # the nodes have an earlier axis's sizes, the plan has not
        found = c.like.meta["planned"][s.axis.name]
    axes = (*c.like.meta.get("attention", ()), found)  # of which the first knows the user's call
    decided = {name: c.like.meta[name] for name in DECIDED if name in c.like.meta}
    meta = {**decided, "attention": axes, "seed": seed_of(s, c, axes[0].dropout)}
    target = STRUCTURED if parts else PLAIN
    node = s.emitter.marked(c.like, target, args, kwargs, c.val.new_empty(shape), meta)
    return Value(c.val, place, node)


def seed_of(s: ShardingInterpreter, c: Call, dropout: float) -> fx.Node | None:
    if not dropout:
        return None
    before = c.like.meta.get("seed")
    return s.dropout_seed(c) if before is None else s.node(s.env[before])


def attended_along(c: Call) -> tuple[str, ...]:
    """The axes written before this one that the attention runs over."""
    return tuple(name for part in c.like.meta.get("attention", ()) for name in part.axes)


def is_taken(s: ShardingInterpreter, c: Call) -> bool:
    """Whether earlier axes are attended over, and the plan does not have this one beside them."""
    planned = c.like.meta.get("planned", {}).get(s.axis.name)
    return bool(attended_along(c)) and not (planned and planned.axes)
