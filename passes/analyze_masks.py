"""What each attention's mask means, in words that a method understands.

    causal = arange[None] <= arange[:, None]
    sdpa(q, k, v, causal)                        ->  sdpa(q, k, v, is_causal=True)
    sdpa(q, k, v, causal & (ids[q] == ids[k]))   ->  mosaic.sdpa(q, k, v, right=0,
                                                         query_documents=ids, key_documents=ids)
    sdpa(q, k, v, expand(padding))               ->  sdpa(q, k, v, padding)      one row for all
    sdpa(q, k, v, table[bucket(k - q)])          ->  mosaic.sdpa(q, k, v, leaves=[k, q, table],
                                                         tile="...")         made tile by tile

A dense mask of a long axis does not fit in memory, and needs the slowest kernel; a compiled
transformers Llama builds one even when it is called without a mask. Legal because the mask's
program is read exactly (``mosaic/masks``): what cannot be read stays in ``attn_mask``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mosaic.attention.blocks import FULL
from mosaic.attention.keys_seen import KeysSeen
from mosaic.attention.scores import behind_leaves
from mosaic.graph.emit import drop_dead, insert
from mosaic.masks.additive import INF, meaning
from mosaic.masks.biases import hides_by_inf
from mosaic.masks.conditions import Allowed
from mosaic.masks.constants import Constants
from mosaic.masks.known import keys_seen
from mosaic.masks.op import ATTENTIONS, PLAIN, STRUCTURED
from mosaic.masks.read import Mask, every_row_sees
from mosaic.masks.terms import BATCH, KEY, QUERY, Term, arranged, broadcast, coordinates, made
from mosaic.masks.tiles import tiles_of
from mosaic.masks.words import band_of, documents_of, scores_of, tile_of, words_of
from mosaic.partition.context import Context
from mosaic.partition.values import Call

aten = torch.ops.aten


def analyze_masks(graph: fx.Graph, context: Context) -> int:
    constants = Constants()
    read: dict[tuple[fx.Node, int, bool], dict[str, Any] | None] = {}
    count = 0
    for node in [n for n in graph.nodes if n.target in ATTENTIONS]:
        call = Call(node.target, node.args, node.kwargs, node.meta["val"], node)
        if says_masks(call):
            continue
        mask, ndim = call["attn_mask"], call.val.ndim
        key = (mask, ndim, call.bound.get("sinks") is not None)
        if isinstance(mask, fx.Node) and key not in read:
            read[key] = structured(graph, mask, call, constants)
            read[key] = with_tiles(graph, mask, ndim, read[key], constants)
        said = read.get(key)
        if said is not None:
            rewrite(node, call, said)
            count += 1
    note_masks(graph, constants)
    drop_dead(graph)
    return count


def note_masks(graph: fx.Graph, constants: Constants) -> None:
    """What each mask says, in words, and which keys may be seen: equal layers are read once."""
    read: dict[tuple[Any, ...], KeysSeen | None] = {}
    for node in [n for n in graph.nodes if n.target in ATTENTIONS]:
        call = Call(node.target, node.args, node.kwargs, None, node)
        mask, leaves = call["attn_mask"], tuple(call.bound.get("leaves") or ())
        node.meta["mask"] = words_of(call.bound, None if mask is None else mask.meta["val"])
        sizes = tuple(call[name].meta["val"].shape[-2] for name in ("query", "key"))
        words = band_of(call.bound), tile_of(call.bound)
        key = (mask, documents_of(call.bound), leaves, *words, sizes)
        if key not in read:
            read[key] = keys_seen(call.bound, constants)
        node.meta["seen"] = read[key]


def says_masks(call: Call) -> bool:
    """Whether a call of ``mosaic.sdpa`` has a mask in words already."""
    made = (documents_of(call.bound), call.bound.get("leaves"))
    bounds = (call.bound.get("left"), call.bound.get("right"))
    return call.target is STRUCTURED and (any(made) or bounds != (None, None))


def structured(
    graph: fx.Graph, mask: fx.Node, call: Call, constants: Constants
) -> dict[str, Any] | None:
    """The arguments that say what ``mask`` says; None where that is no shorter."""
    term = broadcast(mask, call.val.ndim)
    if not term.is_pairwise:
        return None
    found, fill = meaning(term, constants)
    square = call["query"].meta["val"].shape[-2] <= call["key"].meta["val"].shape[-2]
    if call.bound.get("sinks") is not None:  # which every row sees: what is hidden weighs nothing
        fill = -INF
    exact = fill == -INF or is_of_keys(found) or (square and every_row_sees(found))
    if not exact or not is_shorter(found):
        return None
    with graph.inserting_before(mask):
        said = {"attn_mask": dense(graph, found, mask, call.val.ndim, fill), **found.band._asdict()}
        if found.documents is not None:
            said["query_documents"] = identities(graph, found.documents.queries, QUERY)
            said["key_documents"] = identities(graph, found.documents.keys, KEY)
    return said


def with_tiles(
    graph: fx.Graph,
    mask: fx.Node,
    ndim: int,
    said: dict[str, Any] | None,
    constants: Constants,
) -> dict[str, Any] | None:
    """What is left as a tensor for every pair of query and key, as a program that makes tiles."""
    left = mask if said is None else said["attn_mask"]
    if left is None or not broadcast(left, ndim).is_pairwise:
        return said
    mild = hides_by_inf(broadcast(left, ndim), constants)
    with graph.inserting_before(mask):
        found = tiles_of(graph, broadcast(left, ndim), constants)
    if found is None:
        return said
    program, leaves = replace(found[0], mild=mild), found[1]
    return {**(said or {}), "attn_mask": None, "leaves": leaves, "tile": str(program)}


def is_shorter(found: Mask) -> bool:
    """Whether something was read, so that what is left is less than the whole mask."""
    left = [a.term for a in found.allowed] + list(found.biases)
    structure = found.band != FULL or found.documents is not None
    return structure or not any(term.is_pairwise for term in left)


def is_of_keys(found: Mask) -> bool:
    """One row for all queries: ``finfo.min`` may then stay what it is."""
    parts = [a.term for a in found.allowed]
    structure = found.band != FULL or found.documents or found.biases
    return not structure and not any(QUERY in term.coordinates for term in parts)


def dense(graph: fx.Graph, found: Mask, mask: fx.Node, ndim: int, fill: float) -> fx.Node | None:
    """What could not be read, as one tensor: boolean, or added to the scores."""
    order = coordinates(ndim)
    biases = [arranged(graph, term, order) for term in found.biases]
    bias = biases[0] if biases else None
    for other in biases[1:]:
        bias = made(graph, aten.add.Tensor, bias, other)
    if not found.allowed:
        return bias
    allowed = [boolean(graph, a, order) for a in found.allowed]
    both = allowed[0]
    for other in allowed[1:]:
        both = made(graph, aten.logical_and.default, both, other)
    if bias is None and fill == -INF:
        return both
    if bias is None:
        val = mask.meta["val"]
        options = {"dtype": val.dtype, "device": val.device}
        bias = insert(graph, mask, aten.zeros.default, ([],), options)
    return made(graph, aten.where.ScalarOther, both, bias, fill)


def boolean(graph: fx.Graph, allowed: Allowed, order: tuple[int, ...]) -> fx.Node:
    node = arranged(graph, allowed.term, order)
    if not allowed.positive:
        return made(graph, aten.logical_not.default, node)
    return node if is_bool(node) else made(graph, aten.ne.Scalar, node, 0)


def is_bool(node: fx.Node) -> bool:
    return node.meta["val"].dtype == torch.bool


def identities(graph: fx.Graph, term: Term, coordinate: int) -> fx.Node:
    """Which document each query (or key) belongs to: int64 (batch|1, n)."""
    node = arranged(graph, term, (BATCH, coordinate))
    if node.meta["val"].dtype == torch.int64:
        return node
    return insert(graph, node, aten._to_copy.default, (node,), {"dtype": torch.int64})


def rewrite(node: fx.Node, call: Call, said: dict[str, Any]) -> None:
    """The node becomes the call that says the same; it keeps its name and its line."""
    said = {name: value for name, value in said.items() if value is not None}
    if scores_of(call.bound) and "leaves" in said:
        said["scores"] = behind_leaves(scores_of(call.bound), len(said["leaves"]))
    n, m = (call[name].meta["val"].shape[-2] for name in ("query", "key"))
    rises = call["scale"] is None or call["scale"] > 0  # else ATen's kernel for CPUs makes NaN
    if said == {"right": 0} and n == m and rises and call.target is PLAIN:
        said = {"is_causal": True}
    is_plain = said.keys() <= {"attn_mask", "is_causal"} and call.target is PLAIN
    target = PLAIN if is_plain else STRUCTURED
    plain = {**call.bound, "attn_mask": None}
    new = Call(target, (), {**plain, **said}, call.val, node)
    node.target, (node.args, node.kwargs) = target, new.split(new.bound)
