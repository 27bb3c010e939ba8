"""What ``mosaic.attention`` is given, checked before anything is sent."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.attention.blocks import Band
from mosaic.attention.visit import Inputs
from mosaic.layout import Layout
from mosaic.runtime.world import World


def band_of(causal: bool, left: int | None, right: int | None) -> Band:
    """The keys that positions allow. Raises ShardingError for bounds that are no number of keys."""
    for name, bound in (("left", left), ("right", right)):
        if bound is not None and (int(bound) != bound or bound < 0):
            raise ShardingError(
                f"window: {name} = {bound} is no number of keys",
                fix="use 0 or more, or None where it is unbounded",
            )
    if causal:
        right = 0
    return Band(None if left is None else int(left), None if right is None else int(right))


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShardingError unless dims, heads, dtypes and devices of q, k and v fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_is_tensor(name, x)
    sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShardingError(
            "q, k and v are not (batch, heads, seq, head_dim)",
            sizes=sizes,
            fix="fold other dims into the batch, and give one head a dim of 1",
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShardingError(
            "q, k and v do not fit together",
            sizes=sizes,
            fix="q and k share batch and head_dim; k and v share batch, heads and keys",
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShardingError(
            "the KV heads do not divide the heads",
            sizes=f"heads = {q.shape[1]}, KV heads = {k.shape[1]}",
            fix="use a number of KV heads that divides the heads",
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ShardingError(
            "q, k and v are not of one floating dtype",
            dtypes=f"{q.dtype}, {k.dtype}, {v.dtype}",
            fix="cast them to one, such as q.dtype",
        )
    if not q.device == k.device == v.device:
        raise ShardingError(
            "q, k and v are not on one device",
            devices=f"{q.device}, {k.device}, {v.device}",
            fix="move them to one, such as q.device",
        )


def check_is_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise ShardingError(
            f"{name} is no tensor", type=type(given).__name__, fix="pass a torch.Tensor"
        )


def check_probability(dropout: object) -> None:
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ShardingError(f"dropout = {dropout!r} is no probability", fix="use 0 to 1")


def check_scale(scale: object) -> None:
    if scale is not None and not hasattr(scale, "__float__"):
        raise ShardingError(
            f"scale = {scale!r} is no number", fix="give a float, or None for 1 / sqrt(head_dim)"
        )


def fitted(name: str, x: Tensor, layout: Layout | None, world: World, option: str) -> Layout:
    """The layout of dim 2 of ``x`` over these ranks; equal shards where nothing is said. Raises
    ShardingError where ``layout``, the argument ``option``, is for other ranks or sizes."""
    n, p = int(x.shape[2]), world.size
    if layout is None:
        return Layout.even(n * p, p)
    if layout.p != p:
        raise ShardingError(
            f"{option} is for {layout.p} ranks, and this attention is done by {p}",
            layout=layout,
            fix=f"make it for the ranks of '{world.mesh_axis}'; with 'local' the axis is not cut",
        )
    if layout.lengths[world.rank] != n:
        raise ShardingError(
            f"{name} is not the part that {option} says",
            sizes=f"seq = {n}, {option} has {layout.lengths[world.rank]} on rank {world.rank}",
            layout=layout,
            fix=f"cut it with mosaic.shard_tensor(whole, 2, layout={option}), or name its own",
        )
    if p > 1 and not layout.is_partition and layout != Layout.whole(layout.n, p):
        raise ShardingError(
            f"{option} holds an index twice, or leaves one out",
            layout=layout,
            fix="every index belongs to one rank, or all of them to every rank (Layout.whole)",
        )
    return layout


def four_dims(inputs: Inputs) -> Inputs:
    """Masks as (batch|1, heads|1, rows|1, keys|1), documents of both sides as (batch|1, n). Raises
    ShardingError for what has more dims."""
    mask, queries, keys, seed, *_ = inputs
    named = (("mask", mask, 4), ("query_documents", queries, 2), ("key_documents", keys, 2))
    for name, given, dims in named:
        if given is not None:
            check_is_tensor(name, given)
            if given.ndim > dims:
                raise ShardingError(
                    f"{name} has more than {dims} dims",
                    sizes=list(map(int, given.shape)),
                    fix="a mask is (batch, heads, queries, keys), documents are (batch, tokens)",
                )
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    keys = queries if keys is None else keys
    queries, keys = (x if x is None or x.ndim == 2 else x[None] for x in (queries, keys))
    return Inputs(mask, queries, keys, seed)


def check_inputs(q: Tensor, inputs: Inputs, query: Layout, key: Layout) -> None:
    """Raise ShardingError unless mask and documents fit the queries and all keys."""
    mask, queries, keys, *_ = inputs
    if (queries is None) != (keys is None):
        raise ShardingError(
            "key_documents without query_documents", fix="give the ids of all queries, too"
        )
    for name, ids, n in (("query", queries, query.n), ("key", keys, key.n)):
        if ids is not None and (ids.shape[1] != n or ids.shape[0] not in (1, q.shape[0])):
            raise ShardingError(
                f"{name}_documents are not (batch, all {'queries' if name == 'query' else 'keys'})",
                sizes=f"{list(ids.shape)} given, ({q.shape[0]} or 1, {n}) wanted",
                fix="give the ids of the whole axis, and not of this rank's part",
            )
    if mask is None:
        return
    wanted = (q.shape[0], q.shape[1], q.shape[2], key.n)
    if any(size not in (1, want) for size, want in zip(mask.shape, wanted, strict=True)):
        raise ShardingError(
            "the mask is not (batch, heads, this rank's rows, all keys)",
            sizes=f"{list(mask.shape)} given, {list(map(int, wanted))} wanted, or 1 for any",
            fix="cut its rows as the queries are cut, and leave its columns whole",
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ShardingError(
            f"the mask is {mask.dtype}", fix="use a boolean one, or numbers added to the scores"
        )
    if mask.requires_grad and query.is_cut and 1 in query.lengths:
        raise ShardingError(
            "a mask needs a gradient, and a rank has a single query",
            layout=query,
            fix="give every rank two queries or none: one row could be everybody's",
        )
