"""What of an attention's mask depends on sizes alone: which keys its queries may see at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.attention.blocks import FULL, Piece
from mosaic.attention.kernels.seen_blocks import blocks_of
from mosaic.attention.keys_seen import KeysSeen, in_blocks
from mosaic.attention.structure import Structure, of_band, of_documents, of_keys, together
from mosaic.attention.tiles import adds_bias
from mosaic.masks.constants import LIMIT, Constants
from mosaic.masks.words import band_of, documents_of, tile_of

#: Blocks of queries, and of keys, that are looked at: short sequences are read row by row.
BLOCKS = 1024


def keys_seen(bound: Mapping[str, Any], constants: Constants) -> KeysSeen | None:
    """Of a call of ``sdpa``, by the names of its arguments; None where nothing but its band is
    known of it, or all keys may be seen."""
    n, m = (bound[name].meta["val"].shape[-2] for name in ("query", "key"))
    parts, block = known_parts(bound, constants), max(1, -(-max(n, m) // BLOCKS))
    if not parts or not n or not m:
        return None
    if (band := band_of(bound)) != FULL:
        parts.append(of_band(band, torch.arange(n), torch.arange(m)))
    seen = some_in_blocks(together(parts), n, m, block)
    if seen.all():
        return None
    edges = torch.nn.functional.pad(seen.int(), (1, 1)).diff()
    rows: list[list[tuple[int, int]]] = [[] for _ in seen]
    starts, stops = ((edges == sign).nonzero().tolist() for sign in (1, -1))
    for (row, start), (_, stop) in zip(starts, stops, strict=True):
        rows[row].append((start, stop))
    return in_blocks(rows, block, m)


def some_in_blocks(mask: Structure, n: int, m: int, block: int) -> Tensor:
    """Whether any pair of a block may be seen: boolean (blocks of queries, blocks of keys). Of a
    long axis by the bounds of its vectors."""
    if n * m > LIMIT:
        return blocks_of(mask, n, m, block).some.flatten(0, 1).any(0)
    seen = mask.tile(Piece(0, n, 0, m)).flatten(0, 1).any(0).expand(n, m)
    padded = torch.nn.functional.pad(seen, (0, -m % block, 0, -n % block))
    return padded.unflatten(1, (-1, block)).any(2).unflatten(0, (-1, block)).any(1)


def known_parts(bound: Mapping[str, Any], constants: Constants) -> list[Structure]:
    """What has to hold and is known: each a part of the conjunction that the mask is."""

    def values(nodes: Any) -> list[Tensor]:
        """All of them, or none where one is not known."""
        found = [constants(x) if isinstance(x, fx.Node) else None for x in nodes]
        known = [x for x in found if x is not None]
        return known if len(known) == len(found) else []

    parts = []
    if ids := values(documents_of(bound)):
        parts.append(of_documents(*ids))
    tile = tile_of(bound)
    if tile and not adds_bias(tile) and (leaves := values(bound["leaves"])):
        parts.append(Structure(tile, tuple(leaves)))
    for mask in values([bound["attn_mask"]]):
        if mask.dtype == torch.bool and mask.ndim in (2, 4):
            parts.append(of_keys(mask[(None,) * (4 - mask.ndim)]))
    return parts
