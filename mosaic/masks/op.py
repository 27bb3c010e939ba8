"""Scaled dot product attention with a mask in words: what ``analyze_masks`` writes.

It stands in graphs for what rules shard. Run whole it is decomposed: the dense mask is built from
positions, so it is right under autograd, fake tensors and ``torch.compile`` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.attention.tiles import TileProgram

SCHEMA = (
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, int? left=None, "
    "int? right=None, Tensor? query_documents=None, Tensor? key_documents=None, "
    "Tensor[]? leaves=None, str tile='', str scores='', Tensor? sinks=None, str method='', "
    "bool lse=False) -> Tensor"
)

library = torch.library.Library("mosaic", "FRAGMENT")
library.define(SCHEMA)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    left: int | None = None,
    right: int | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    leaves: Sequence[Tensor] | None = None,
    tile: str = "",
    scores: str = "",
    sinks: Tensor | None = None,
    method: str = "",
    lse: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` in which query i sees key j only where

    - i - left <= j <= i + right (None: no bound; ``is_causal`` is right=0), and
    - query_documents[b, i] == key_documents[b, j]: int64, (batch|1, queries) and (batch|1, keys).

    ``attn_mask`` is boolean or added to the scores, as ever. In its place there may be a
    ``TileProgram`` that makes it of ``leaves`` (``attention/tiles.py``). ``scores``: a program that
    is given all leaves and the scaled score, and gives what replaces it, before the mask. ``sinks``
    (heads): scores of one more key that all queries see, of value 0. ``method``: the key of the one
    that the call names, for an axis that is cut. ``lse``: the output is float32 or float64, and the
    log-sum-exp of each row's scores is one more column of it.
    """
    if tile:
        attn_mask = TileProgram.parse(tile)(*leaves or ())
        attn_mask = attn_mask if query.ndim > 3 else attn_mask.squeeze(1)
    seen = in_band(query, key, left, right, is_causal)
    if query_documents is not None and key_documents is not None:
        same = query_documents[:, :, None] == key_documents[:, None, :]
        same = same[:, None] if query.ndim > 3 else same
        seen = same if seen is None else seen & same
    mask = allowed(attn_mask, seen)
    if scores or lse:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        change = partial(TileProgram.parse(scores), *leaves or ()) if scores else unchanged
        rest = (mask, dropout_p, scale, enable_gqa, change, sinks, lse)
        return written_out(query, key, value, *rest)
    if sinks is not None:
        mask = with_column(mask, sinks.to(query.dtype), query, key)
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa
    )


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    change: Callable[[Tensor], Tensor],
    sinks: Tensor | None,
    lse: bool,
) -> Tensor:
    """Attention by plain products, whose scores (batch, heads, queries, keys) are changed."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    dtype = accumulator(query.dtype)
    score = (query.to(dtype) @ key.to(dtype).mT) * scale
    score = change(score) if query.ndim > 3 else change(score.unsqueeze(1)).squeeze(1)
    score = score.to(dtype)
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, -float("inf"))
    elif mask is not None:
        score = score + mask
    if sinks is not None:
        column = sinks.to(dtype).view(-1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, column], -1)
    weights = torch.ops.aten._safe_softmax.default(score, -1)[..., : key.shape[-2]]
    out = torch.dropout(weights, dropout_p, True) @ value.to(dtype)
    return torch.cat([out, score.logsumexp(-1, True)], -1) if lse else out.to(query.dtype)


def unchanged(scores: Tensor) -> Tensor:
    return scores


def in_band(
    query: Tensor, key: Tensor, left: int | None, right: int | None, is_causal: bool
) -> Tensor | None:
    """(queries, keys), boolean; None: everything is seen."""
    if is_causal:
        right = 0 if right is None else min(right, 0)
    i = torch.arange(query.shape[-2], device=query.device)[:, None]
    j = torch.arange(key.shape[-2], device=key.device)[None]
    bounds = [] if left is None else [i - left <= j]
    bounds += [] if right is None else [j <= i + right]
    if not bounds:
        return None
    return bounds[0] if len(bounds) == 1 else bounds[0] & bounds[1]


def allowed(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """``mask``, and nothing where ``seen`` is False."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, -float("inf"))


def with_column(mask: Tensor | None, sinks: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``mask`` as numbers to add, with those of one more key, which has a score of 0."""
    if mask is None:
        mask = query.new_zeros([])
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -float("inf"))
    column = sinks.view(-1, 1, 1)
    shape = [sinks.numel(), query.shape[-2], key.shape[-2]]
    mask = mask.expand(torch.broadcast_shapes(mask.shape, shape))
    return torch.cat([mask, column.expand(*mask.shape[:-1], 1)], -1)


library.impl("sdpa", sdpa, "CompositeImplicitAutograd")

PLAIN = torch.ops.aten.scaled_dot_product_attention.default
STRUCTURED = torch.ops.mosaic.sdpa.default
ATTENTIONS = (PLAIN, STRUCTURED)
