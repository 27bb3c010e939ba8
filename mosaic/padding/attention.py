"""Attention where keys may be padding: a causal one sees none, from others they are hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mosaic.graph.lengths import NotPaddedError
from mosaic.layout import Place
from mosaic.masks.additive import INF, meaning
from mosaic.masks.read import every_row_sees
from mosaic.masks.terms import broadcast
from mosaic.padding.follow import Follower, arguments

aten = torch.ops.aten


def attention(f: Follower, node: fx.Node) -> Any:
    """Queries are rows by themselves; of keys only the real ones are seen."""
    given = arguments(node, attn_mask=None, is_causal=False)
    query, mask = given["query"], given["attn_mask"]
    rows = place_of(f, query)
    keys = {place_of(f, given[name]) for name in ("key", "value")}
    if len(keys) > 1:
        raise NotPaddedError("has keys and values of two lengths")
    kept = [place for place in (rows,) if place]
    for x in dict.fromkeys(given[name] for name in ("query", "key", "value")):
        others = [place for place in f.places[x] if place.dim != x.meta["val"].ndim - 2]
        kept += [f.probed(node, x, place) for place in others]
    if None in kept:
        raise NotPaddedError("attention mixes rows of another dim")
    (seen,) = keys
    if seen and not is_causal(f, node, given, rows, seen):
        if given["is_causal"]:
            raise NotPaddedError("is causal, and has keys of another length")
        hide(f, node, mask, seen)
    return f.checked(node, kept)


def place_of(f: Follower, x: fx.Node) -> Place | None:
    """Where queries or keys are rows. Raises NotPaddedError for a dim that holds others, too."""
    dim = x.meta["val"].ndim - 2
    place = next((place for place in f.places[x] if place.dim == dim), None)
    if place and (place.outer, place.inner) != (1, 1):
        raise NotPaddedError("attends over rows and another dim, flattened")
    return place


def is_causal(
    f: Follower, node: fx.Node, given: dict[str, Any], rows: Place | None, keys: Place
) -> bool:
    """Whether no row that is real sees a key that is padding."""
    if rows is None or rows.layout.n > keys.layout.n:
        return False
    mask = given["attn_mask"]
    return bool(given["is_causal"]) or (mask is not None and says_causal(f, mask, node))


def says_causal(f: Follower, mask: fx.Node, node: fx.Node) -> bool:
    """Whether a mask hides all later keys, whatever else it does."""
    term, constants = broadcast(mask, node.meta["val"].ndim), f.constants
    if not term.is_pairwise:
        return False
    found, fill = meaning(term, constants)
    hides = fill == -INF or every_row_sees(found)
    return hides and found.band.right is not None and found.band.right <= 0


def hide(f: Follower, node: fx.Node, mask: fx.Node | None, keys: Place) -> None:
    """Keys that are padding are in no row's mask."""
    query = node.args[0].meta["val"]
    like = query.new_empty([1] * max(2, query.ndim - 1) + [keys.size])
    real = f.real(node, keys.at(like.ndim - 1), like)
    if mask is None:
        seen = real
    elif mask.meta["val"].dtype == torch.bool:
        seen = f.write(node, aten.logical_and.default, mask, real)
    else:
        hidden = f.write(node, aten.logical_not.default, real)
        seen = f.write(node, aten.masked_fill.Scalar, mask, hidden, -INF)
    call = {**arguments(node), "attn_mask": seen}
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
    node.args = tuple(call.pop(name) for name in names[:4])
    node.kwargs = call
