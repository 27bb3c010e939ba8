"""What a call of ``sdpa`` (ATen's or ours) says about its mask, by the names of its arguments; and
how plans print it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mosaic.attention.blocks import Band
from mosaic.attention.tiles import TileProgram, adds_bias


def band_of(bound: Mapping[str, Any]) -> Band:
    """Which keys a query sees; ATen's op has only ``is_causal``."""
    left, right = bound.get("left"), bound.get("right")
    if bound["is_causal"]:
        right = 0 if right is None else min(right, 0)
    return Band(left, right)


def documents_of(bound: Mapping[str, Any]) -> tuple[Any, ...]:
    """The ids of queries and of keys, if a query sees only keys with its own id; else ()."""
    queries = bound.get("query_documents")
    return () if queries is None else (queries, bound["key_documents"])


def tile_of(bound: Mapping[str, Any]) -> str:
    """The ``TileProgram`` of a mask; "" where there is none."""
    return bound.get("tile") or ""


def scores_of(bound: Mapping[str, Any]) -> str:
    """The program that changes scores; "" where there is none."""
    return bound.get("scores") or ""


def words_of(bound: Mapping[str, Any], mask: Tensor | None) -> str:
    """What a call says, in words; ``mask``: the value of its ``attn_mask``."""
    has_sinks = bound.get("sinks") is not None
    band, documents = band_of(bound), bool(documents_of(bound))
    return mask_words(band, documents, mask, tile_of(bound), scores_of(bound), has_sinks)


def mask_words(
    band: Band,
    documents: bool,
    mask: Tensor | None,
    tile: str = "",
    scores: str = "",
    sinks: bool = False,
) -> str:
    """
    >>> mask_words(Band(4095, 0), True, None)
    'causal, window 4096, documents'
    >>> mask_words(Band(None, None), False, None, "float32: sub.Tensor(%0, %1)")
    'float by tiles'
    >>> mask_words(Band(None, 0), False, None, "", "float32: tanh(%0); mul.Tensor(%1, 50.0)")
    'softcap 50, causal'
    >>> mask_words(Band(None, 0), False, None, sinks=True)
    'sinks, causal'
    """
    said = ("sinks" if sinks else "", str(band), "documents" if documents else "")
    words = [score_words(scores)] if scores else []
    words += [word for word in said if word]
    if mask is not None:
        of_keys = mask.ndim < 2 or mask.shape[-2] == 1
        words.append(TENSORS[of_keys, mask.dtype == torch.bool])
    if tile:
        words.append("float by tiles" if adds_bias(tile) else "boolean by tiles")
    return ", ".join(words)


def score_words(scores: str) -> str:
    """``cap * tanh(score)`` is a softcap; anything else a program."""
    cap = TileProgram.parse(scores).softcap
    return f"softcap {cap:g}" if cap else "scores by a program"


#: (one row for all queries, boolean)
TENSORS = {
    (True, True): "padding",
    (True, False): "bias of keys",
    (False, True): "dense boolean",
    (False, False): "dense float",
}
