"""THE TABLE: for every op, what is legal when an axis of its operands is cut into shards.

Strings say it where they say it all, in einops-like notation: an axis on both sides of ``->`` is
free; one that vanishes makes partial sums, which one all-reduce joins; ``whole`` may not be cut.

    ``...`` leading dims   i o c  features   m k n  of a matmul   v e  vocabulary, embedding

Ops whose local form is another program name a function in this folder. Every pointwise op of
ATen shares one rule. An op without a row is decomposed if torch knows how, else gathered, loudly.
``python -m mosaic`` prints the table; tests/ranks/test_rules.py proves every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from mosaic.graph.ops import is_pointwise, key
from mosaic.layout import Place
from mosaic.partition import (
    attention,
    empty,
    functions,
    indexing,
    losses,
    normalization,
    other_axes,
    randomness,
    recurrences,
    reductions,
    routing,
    scans,
    views,
    windows,
    writes,
)
from mosaic.partition.decomposed import decomposed
from mosaic.partition.interpreter import Rules, ShardingInterpreter
from mosaic.partition.pointwise import pointwise
from mosaic.partition.probing import probe
from mosaic.partition.values import Call, Value, candidates
from mosaic.torch_private import has_decomposition

LocalForm = Callable[[ShardingInterpreter, Call], Any]


@dataclass(frozen=True)
class Rule:
    """One row: names for the dims of each tensor operand and of the result."""

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    whole: frozenset[str]
    bias: str = ""  # an operand that is added once, after the partial sums have met

    def __str__(self) -> str:
        text = ", ".join(" ".join(o) for o in self.operands) + " -> " + " ".join(self.result)
        summed = {n for o in self.operands for n in o} - set(self.result) - self.whole
        notes = [f"whole={{{' '.join(sorted(self.whole))}}}"] if self.whole else []
        notes += [f"sum={{{' '.join(sorted(summed))}}}"] if summed else []
        return "  ".join([text, *notes])

    def __call__(self, s: ShardingInterpreter, c: Call) -> Value:
        names = [a.name for a in c.target._schema.arguments if isinstance(c[a.name], Value)]
        lead = max((n for n in names if c[n].place), key=lambda n: c[n].val.numel())
        place = c[lead].place
        dims = dict(zip(names, self.operands, strict=False))
        axis = named_dims(dims[lead], c[lead].ndim)[place.dim]
        result = named_dims(self.result, c.val.ndim)
        if axis in result and c.val.shape[result.index(axis)] != place.size:
            return self.broadcast(s, c, lead)
        if axis in self.whole:
            return s.gather_for(c, f"needs its {axis!r} whole")
        changed: dict[str, Any] = {}
        for name in names:
            found = named_dims(dims[name], c[name].ndim)
            at = found.index(axis) if axis in found else None
            if at is None or c[name].shape[at] != place.size:
                changed[name] = s.gather_aloud(c[name], "is cut along another dim", c.like)
            else:
                changed[name] = s.at(c[name], place.at(at))
        if axis in result:
            return s.emit(c, place.at(result.index(axis)), **changed)
        return self.summed(s, c, axis, changed)

    def broadcast(self, s: ShardingInterpreter, c: Call, name: str) -> Value:
        whole = s.gather(c[name], "a length of 1 is broadcast", c.like)
        return s.again(c.replaced({name: whole}))

    def summed(self, s: ShardingInterpreter, c: Call, axis: str, changed: dict[str, Any]) -> Value:
        bias = changed.get(self.bias)
        if bias is not None:
            changed = {**changed, self.bias: None}
        partial_sum = s.emit(c, None, enter=True, **changed)
        out = s.sum_across(partial_sum, c, f"{c.name} sums over {axis!r}")
        return out if bias is None else s.call(c, torch.ops.aten.add.Tensor, out, bias)


def named_dims(names: tuple[str, ...], ndim: int) -> list[str]:
    """``... i`` for three dims is ``...2 ...1 i``: leading dims are counted from the right."""
    rest = ndim - (len(names) - ("..." in names))
    leading = [f"...{rest - i}" for i in range(rest)]
    return [d for n in names for d in (leading if n == "..." else [n])]


def rule(text: str, whole: str = "", bias: str = "") -> Rule:
    """
    >>> print(rule("... i, o i, o -> ... o", bias="bias"))
    ... i, o i, o -> ... o  sum={i}
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"sharding rule {text!r}: no '->'")
    operands = tuple(tuple(o.split()) for o in left.split(","))
    unknown = set(right.split()) - {n for o in operands for n in o} - {"c"}
    if unknown:
        raise ValueError(f"sharding rule {text!r}: {unknown} is in no operand")
    return Rule(operands, tuple(right.split()), frozenset(whole.split()), bias)


def matmul(s: ShardingInterpreter, c: Call) -> Value:
    """Rows, columns and batches are free; the dim that is summed over makes partial sums."""
    x, y = (1 if c[n].ndim == 1 else 2 for n in ("self", "other"))
    return MATMUL[x, y](s, c)


MATMUL = {
    (1, 1): rule("k, k ->"),
    (2, 1): rule("... m k, k -> ... m"),
    (1, 2): rule("k, ... k n -> ... n"),
    (2, 2): rule("... m k, ... k n -> ... m n"),
}


EMBEDDING = rule("v e, ... -> ... e", whole="v")


def embedding(s: ShardingInterpreter, c: Call) -> Any:
    """Looks up what is here, unless the gradient depends on what is looked up elsewhere."""
    if c["scale_grad_by_freq"] or c["sparse"]:
        return s.gather_for(c, "counts how often an entry is used, or has a sparse gradient")
    table = c["weight"]
    if table.place and table.cut.dim == 1:  # CUDA's gradient of a width of 0 reads out of bounds
        return empty.emit(s, c, table.cut.at(c.val.ndim - 1), "weight")
    return EMBEDDING(s, c)


ONE_ROW, ROWS = (
    rule("v, ..., v -> ...", whole="v"),
    rule("... v, ... w, ... v -> ... w", whole="v"),
)


def searchsorted(s: ShardingInterpreter, c: Call) -> Value:
    """One sorted row for all values, or a row for each row of them."""
    return (ONE_ROW if c["sorted_sequence"].ndim == 1 else ROWS)(s, c)


def along(dim: str) -> LocalForm:
    """Works along one dim (``argmax``, ``cumsum``, ``sort``): every other dim is free."""
    return partial(reductions.along, name=dim)


TABLE: dict[str, LocalForm] = {
    # contractions
    "linear": rule("... i, o i, o -> ... o", bias="bias"),
    "matmul": matmul,
    "mm": rule("m k, k n -> m n"),
    "bmm": rule("b m k, b k n -> b m n"),
    "mv": rule("m k, k -> m"),
    "dot": rule("k, k ->"),
    "cdist": rule("... m k, ... n k -> ... m n", whole="k"),
    # normalisation and probabilities
    "layer_norm": normalization.layer_norm,
    "rms_norm": normalization.layer_norm,
    "group_norm": normalization.group_norm,
    "_native_batch_norm_legit_functional": normalization.batch_norm,
    "_native_batch_norm_legit.no_stats": normalization.batch_norm,
    "_native_batch_norm_legit_no_training": normalization.batch_norm,
    "softmax.int": normalization.softmax,
    "log_softmax.int": normalization.log_softmax,
    "_softmax": normalization.softmax,
    "_log_softmax": normalization.log_softmax,
    # attention
    "scaled_dot_product_attention": attention.scaled_dot_product_attention,
    "mosaic::sdpa": attention.scaled_dot_product_attention,  # the mask in words
    # lookups
    "embedding": embedding,
    "one_hot": rule("... -> ... c"),
    "index.Tensor": indexing.index,
    "index_select": indexing.index_select,
    "gather": indexing.gather,
    "index_put": writes.index_put,
    "index_add": writes.index_write,
    "index_copy": writes.index_write,
    "index_fill.int_Scalar": writes.index_write,
    "index_fill.int_Tensor": writes.index_write,
    "scatter.src": writes.scatter,
    "scatter.value": writes.scatter,
    "scatter.value_reduce": writes.scatter,
    "scatter_add": writes.scatter,
    "scatter_reduce.two": writes.scatter,
    "bucketize.Tensor": rule("..., v -> ...", whole="v"),
    "searchsorted.Tensor": searchsorted,
    "tril": indexing.triangle,
    "triu": indexing.triangle,
    # views
    "view": views.view,
    "_unsafe_view": views.view,
    "expand": views.expand,
    "repeat": views.repeat,
    "repeat_interleave.self_int": views.repeat_interleave,
    "permute": views.permute,
    "transpose.int": views.transpose,
    "t": views.transpose,
    "unsqueeze": views.unsqueeze,
    "squeeze": views.squeeze,
    "squeeze.dim": views.squeeze,
    "squeeze.dims": views.squeeze,
    "select.int": views.select,
    "slice.Tensor": views.slice_,
    "split.Tensor": views.split,
    "split_with_sizes": views.split,
    "unbind.int": views.unbind,
    "cat": views.cat,
    "stack": views.stack,
    "constant_pad_nd": views.pad,
    "pad": views.pad,
    "roll": views.roll,
    "flip": views.flip,
    "view_as_complex": views.as_complex,
    "view_as_real": views.same_place,
    "slice_scatter": views.slice_scatter,
    "select_scatter": views.select_scatter,
    # reductions
    "sum": reductions.total,
    "sum.dim_IntList": reductions.total,
    "mean": reductions.mean,
    "mean.dim": reductions.mean,
    "var.correction": reductions.var,
    "var.dim": reductions.var,
    "var": reductions.var,
    "std.correction": reductions.std,
    "std.dim": reductions.std,
    "std": reductions.std,
    "var_mean.correction": reductions.var_mean,
    "std_mean.correction": reductions.var_mean,
    "amax": reductions.extreme,
    "amin": reductions.extreme,
    "max": reductions.extreme,
    "min": reductions.extreme,
    "any": reductions.any_,
    "any.dim": reductions.any_,
    "any.dims": reductions.any_,
    "all": reductions.all_,
    "all.dim": reductions.all_,
    "all.dims": reductions.all_,
    "logsumexp": reductions.logsumexp,
    "linalg_vector_norm": reductions.norm,
    "norm.ScalarOpt_dim": reductions.norm,
    "prod": reductions.product,
    "prod.dim_int": reductions.product,
    "nansum": reductions.nansum,
    "nanmean": reductions.nanmean,
    "cosine_similarity": reductions.cosine_similarity,
    "max.dim": scans.extreme_along,
    "min.dim": scans.extreme_along,
    "argmax": scans.arg_extreme,
    "argmin": scans.arg_extreme,
    "cumsum": scans.scan,
    "cumprod": scans.scan,
    "logcumsumexp": scans.scan,
    "cummax": along("dim"),
    "cummin": along("dim"),
    "kthvalue": along("dim"),
    "mode": along("dim"),
    "nanmedian.dim": along("dim"),
    "quantile": reductions.quantile,
    "quantile.scalar": reductions.quantile,
    "nanquantile": reductions.quantile,
    "nanquantile.scalar": reductions.quantile,
    "_fft_r2c": reductions.transform,
    "_fft_c2c": reductions.transform,
    "_fft_c2r": reductions.transform,
    "sort": partial(routing.sort, along=along("dim")),
    "sort.stable": partial(routing.sort, along=along("dim")),
    "argsort": partial(routing.sort, along=along("dim")),
    "topk": along("dim"),
    "median.dim": along("dim"),
    "glu": along("dim"),
    # a state that goes along the axis
    "mosaic::recurrence": recurrences.recurrence,
    # losses
    "cross_entropy_loss": losses.cross_entropy,
    "nll_loss_nd": losses.cross_entropy,
    "mosaic::token_losses": losses.token_losses,  # of a head: no logits
    # windows that slide: batches are free
    "conv1d": windows.convolution,
    "conv2d": windows.convolution,
    "conv3d": windows.convolution,
    "conv1d.padding": windows.convolution,
    "conv2d.padding": windows.convolution,
    "conv3d.padding": windows.convolution,
    "convolution": windows.convolution,
    "avg_pool1d": windows.pool,
    "avg_pool2d": windows.pool,
    "avg_pool3d": windows.pool,
    "max_pool1d": windows.pool,
    "max_pool2d": windows.pool,
    "max_pool3d": windows.pool,
    "max_pool2d_with_indices": windows.pool,
    "max_pool3d_with_indices": windows.pool,
    "adaptive_avg_pool1d": windows.adaptive_pool,
    "adaptive_avg_pool2d": windows.adaptive_pool,
    "adaptive_avg_pool3d": windows.adaptive_pool,
    "adaptive_max_pool1d": windows.adaptive_pool,
    "adaptive_max_pool2d": windows.adaptive_pool,
    "adaptive_max_pool3d": windows.adaptive_pool,
    "unfold": windows.unfold,
    # randomness
    "dropout": randomness.dropout,
    # written behind autograd's back
    "mosaic::with_history": pointwise,
    "mosaic::counted_mask": pointwise,
    # the user's own
    "mosaic::autograd_function": functions.autograd_function,
}

CREATED = frozenset({"zeros", "ones", "full", "empty.memory_format"})
NEVER_AS_IS = frozenset(
    {"dropout", "mosaic::autograd_function", "mosaic::recurrence", "mosaic::sdpa"}
)


def rule_for(target: Any) -> LocalForm:
    """The rule of an op: its row, the pointwise rule, its decomposition, or a gather."""
    name = key(target)
    if name in TABLE:
        return TABLE[name]
    if torch.Tag.nondeterministic_seeded in target.tags:
        return randomness.drawn_once
    if is_pointwise(target):
        return pointwise
    return decomposed if has_decomposition(target) else unknown


def unknown(s: ShardingInterpreter, c: Call) -> Any:
    return s.gather_for(c, "has no rule")


def written_whole(node: fx.Node) -> LocalForm | None:
    """Ops that even whole are not written as they are: every rank would draw its own numbers."""
    if not hasattr(node.target, "_schema"):
        return None
    if "attention" in node.meta:
        return attention.whole
    name = key(node.target)
    if name in NEVER_AS_IS:
        return TABLE[name]
    if name == "scaled_dot_product_attention":
        return attention.whole if dropout_of(node) else None
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return None
    call = Call(node.target, node.args, node.kwargs, None, node)
    return None if randomness.is_certain(call) else randomness.drawn_once


def dropout_of(node: fx.Node) -> float:
    return node.kwargs.get("dropout_p") or (node.args[4] if len(node.args) > 4 else 0.0)


def pull(s: ShardingInterpreter, node: fx.Node, place: Place) -> dict[fx.Node, Place] | None:
    """Where an operand of ``node`` must be cut to have its result at ``place``; {}: nothing to cut.

    There are no backward rules: candidates go through the forward rule, and one that fits is right.
    None: this op cannot be computed in parts; its whole result is sliced.
    """
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not operands:
        return {} if key(node.target) in CREATED else None
    if key(node.target) == "slice.Tensor":
        return pull_slice(node, place)
    if rule_for(node.target) is pointwise:
        return pull_pointwise(operands, node, place)
    for operand in operands:
        for candidate in candidates(operand.meta["val"].shape, place):
            if probe(s.axis, s.rules, node, {operand: candidate}) == place:
                return {operand: candidate}
    return None


def pull_pointwise(
    operands: list[fx.Node], node: fx.Node, place: Place
) -> dict[fx.Node, Place] | None:
    """Every operand that is as long there, at once: what is not named here is asked for by the
    rule, which calls for its operands' operands in turn, and programs may be long."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor):
        return None
    found = {}
    for x in operands:
        dim = place.dim - (val.ndim - x.meta["val"].ndim)
        if dim >= 0 and x.meta["val"].shape[dim] == place.size:
            found[x] = place.at(dim)
    return found or None


def pull_slice(node: fx.Node, place: Place) -> dict[fx.Node, Place] | None:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    x, dim, start, stop, step = tuple(node.args) + defaults[len(node.args) - 1 :]
    shape = x.meta["val"].shape
    if dim % len(shape) != place.dim:
        return {x: place}
    first, _, step = slice(start, stop, step).indices(shape[dim])
    place = place.refined()
    if step != 1 or (place.outer, place.inner) != (1, 1):
        return None
    return {x: place.with_layout(place.layout.embed(first, shape[dim]))}


#: What interpreters are given.
RULES = Rules(
    rule_for, pull, written_whole, routing.follow, other_axes.HELPERS, other_axes.COLLECTIVES
)
