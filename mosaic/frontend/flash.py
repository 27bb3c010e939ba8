"""Calls of flash attention, by torch and by the package flash_attn, as what they are defined to be.

    varlen_attn(q, k, v, cu_seqlens, cu_seqlens, ..., window_size=(-1, 0))      (tokens, heads, dim)
    ->   document = bucketize(arange(tokens), cu_seqlens, right=True)
         seen = (document[:, None] == document) & (key <= query)

Where each text begins stays data: other texts of as many tokens in all are no new program. What is
seen follows a call's own numbers: the last query of a text stands beside its last key.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mosaic.api.errors import UnsupportedError
from mosaic.frontend.fused import attended
from mosaic.frontend.refused import schema_of


class Positions(NamedTuple):
    """Where queries (n, 1) and keys (1, m) stand, counted alike, and in which text."""

    queries: Tensor
    keys: Tensor
    query_texts: Tensor | None = None
    key_texts: Tensor | None = None

    def seen(self, causal: bool, left: int, right: int) -> Tensor | None:
        """The keys that are at most ``left`` before a query and ``right`` behind it, in its text;
        -1: no bound."""
        right = 0 if causal else right
        i, j = self.queries, self.keys
        found: list[Tensor] = []
        if self.query_texts is not None and self.key_texts is not None:
            found.append(self.query_texts == self.key_texts)
        found += [] if left < 0 else [j >= i - left]
        found += [] if right < 0 else [j <= i + right]
        return reduce(operator.and_, found) if found else None


def aligned(queries: int, keys: int, device: torch.device) -> Positions:
    """Of one text: its last query beside its last key."""
    i, j = (torch.arange(n, device=device) for n in (queries, keys))
    return Positions((i + (keys - queries))[:, None], j[None])


def packed(q: Tensor, k: Tensor, begins: Tensor, key_begins: Tensor) -> Positions:
    """Of texts one behind the other. (What is behind the last one is one more text.)"""
    i, text = located(len(q), begins)
    j, key_text = located(len(k), key_begins)
    if begins is not key_begins:  # else a text's queries and keys stand at the same numbers
        last = len(begins) - 1
        i, j = i - begins[text.clamp(max=last)], j - key_begins[key_text.clamp(max=last)]
    return Positions(i[:, None], j[None], text[:, None], key_text[None])


def located(n: int, begins: Tensor) -> tuple[Tensor, Tensor]:
    """Positions, and which text each is in, counted from 1: where the next one begins."""
    i = torch.arange(n, device=begins.device)
    return i, torch.bucketize(i, begins.long(), right=True)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, at: Positions, scale: float | None, causal: bool,
    window: tuple[int, int], softcap: float = 0.0, slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(batch, seq, heads, dim): the output, and the log-sum-exp (batch, heads, queries)."""

    def change(scores: Tensor) -> Tensor:
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is None:
            return scores
        return scores - slopes[..., None, None] * (at.queries - at.keys).abs()

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, scores = attended(q, k, v, scale, change, at.seen(causal, *window), dropout)
    return out.transpose(1, 2), scores.logsumexp(-1).float()


def refuse(**given: Any) -> None:
    names = [name for name, x in given.items() if x is not None and x is not False]
    if names:
        raise UnsupportedError(
            f"a call of flash attention with {', '.join(names)}",
            reason="it is for decoding with a cache, for looking at the weights, or in the "
            "package's own language",
            fix="leave it out, or call it outside of the compiled function",
        )


def of_torch(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, is_causal: bool = False, scale: float | None = None,
    window_size: list[int] | None = None, enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.nn.attention.varlen``'s op."""
    refuse(seqused_k=seqused_k, block_table=block_table)
    at = packed(query, key, cu_seq_q, cu_seq_q if cu_seq_k is None else cu_seq_k)
    q, k, v = query[None], key[None], value[None]
    left, right = window_size or (-1, -1)
    out, lse = flash_attention(q, k, v, at, scale, is_causal, (left, right))
    lse = lse.detach()  # as there: it has no gradient
    return out[0], lse[0], torch.zeros(2, dtype=torch.int64, device=query.device)


#: Where the package's functions are, by its version.
PACKAGES = {
    "flash_attn.flash_attn_interface": 2,
    "flash_attn_interface": 3,
    "flash_attn.cute.interface": 4,
}
FUNCTIONS = [
    f"flash_attn_{texts}{packed}func"
    for texts in ("", "varlen_")
    for packed in ("", "qkvpacked_", "kvpacked_")
]
#: What the package's functions are told that is read here; and what says how it is done, not what.
READ = {
    *("q", "k", "v", "qkv", "kv", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "dropout_p"),
    *("softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"),
    *("return_attn_probs", "return_lse"),
}
UNREAD = {
    *("max_seqlen", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k"),
    *("deterministic", "num_splits", "pack_gqa", "sm_margin"),
}


def of_package(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of one of the ``FUNCTIONS``, of any version: those differ in what they take, and call
    it by the same names."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    defaults = {name: x.default for name, x in signature.parameters.items()}
    others = {k: x for k, x in bound.arguments.items() if k not in READ | UNREAD}
    refuse(**{name: x for name, x in others.items() if x is not defaults[name]})
    bound.apply_defaults()
    given, version = bound.arguments, PACKAGES[function.__module__]
    q, k, v = operands_of(given)
    begins = given.get("cu_seqlens", given.get("cu_seqlens_q"))
    key_begins = given.get("cu_seqlens", given.get("cu_seqlens_k"))
    slopes, dropout = given.get("alibi_slopes"), given.get("dropout_p", 0.0)
    left, right = (-1 if x is None else x for x in given["window_size"])
    rest = (given["softmax_scale"], given["causal"], (left, right), given["softcap"])
    if begins is None or key_begins is None:
        at = aligned(q.shape[1], k.shape[1], q.device)
        out, lse = flash_attention(q, k, v, at, *rest, slopes, dropout)
    else:
        if slopes is not None and slopes.ndim > 1:
            refuse(**{"alibi_slopes of each text": slopes})
        at, (q, k, v) = packed(q, k, begins, key_begins), (x[None] for x in (q, k, v))
        out, lse = (x[0] for x in flash_attention(q, k, v, at, *rest, slopes, dropout))
    if not given.get("return_lse"):  # of version 4, which alone gives it a gradient
        lse = lse.detach()
    asked = given.get("return_attn_probs", version > 2)
    if version == 2 and asked and dropout:
        refuse(**{"return_attn_probs and dropout_p": dropout})
    return (out, lse, q.new_empty(0))[: 3 if version == 2 else 2] if asked else out


def operands_of(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of those that a call packs into one tensor."""
    if "qkv" in given:
        q, k, v = given["qkv"].unbind(-3)
        return q, k, v
    k, v = given["kv"].unbind(-3) if "kv" in given else (given["k"], given["v"])
    return given["q"], k, v


def call_of(target: Any) -> Callable[..., Any] | None:
    """What capture runs in place of a call in Dynamo's graph, if it is one of these."""
    schema = schema_of(target)
    if schema is not None:
        return of_torch if schema.name == "torch_attn::_varlen_attn" else None
    is_known = getattr(target, "__module__", "") in PACKAGES and target.__name__ in FUNCTIONS
    return partial(of_package, target) if is_known else None


def allow_package() -> None:
    """Have Dynamo keep calls of the package, if anybody has imported it. (It breaks the graph at
    such an autograd.Function where one tensor says where queries and keys begin.)"""
    for module in PACKAGES:
        for name in FUNCTIONS:
            function = getattr(sys.modules.get(module), name, None)
            if function is not None:
                torch.compiler.allow_in_graph(function)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """What one of these calls in Dynamo's graph is given, by name; of any other one nothing."""
    run = call_of(node.target) if node.op == "call_function" else None
    if run is None:
        return {}
    signature = inspect.signature(of_torch if run is of_torch else node.target)
    return signature.bind(*node.args, **node.kwargs).arguments


def begins_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that tell such a call where texts begin."""
    given = arguments_of(node).items()
    return [x for name, x in given if name.startswith("cu_seq") and isinstance(x, fx.Node)]


def forget_lengths(module: fx.GraphModule) -> None:
    """Take the length of the longest text out of these calls: nothing depends on it, and every
    other one would be another program."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if given := arguments_of(node):
                longest = {name: 0 for name in given if name.startswith("max_")}
                node.args, node.kwargs = (), {**given, **longest}
