"""product -> scale -> mask -> softmax -> dropout -> product becomes one attention node.

    scores = matmul(q, transpose(k, -2, -1))                einsum, bmm and baddbmm as well
    scores = masked_fill(add(mul(scores, scale), bias), hidden, -1e9)      any number of masks
    out = matmul(dropout(softmax(scores, -1)), v)
        ->  out = sdpa(q, k, v, where(~hidden, bias, -inf), dropout_p, scale=scale)

A softcap between scale and masks (``cap * tanh(scores / cap)``) is a score program of mosaic.sdpa.

What else reads the scores' log-sum-exp reads one more column of the attention's output.

Unmodified models need this: ``nn.MultiheadAttention`` with its default ``need_weights=True`` never
calls SDPA. Legal because it is the same function; where something else reads the scores or the
weights, they are computed for it as well.

A row that sees no key is nan where scores are hidden by -inf: so it is made nan, with the gradients
that are, where the masks do not say that every row sees a key. Where they are hidden by a
finite number it weighs all hidden keys alike: there such a row gets q = 0, and the number is added:
equal scores, no gradient to q and k, and each value's share of the gradient. (A key is not seen
either where a bias is as low.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import UnsupportedError
from mosaic.graph.emit import insert
from mosaic.graph.source import where
from mosaic.masks.additive import INF, additive
from mosaic.masks.biases import hides_fully, is_mild, may_be_lowest
from mosaic.masks.conditions import Allowed
from mosaic.masks.constants import Constants
from mosaic.masks.op import PLAIN, STRUCTURED
from mosaic.masks.products import Operand, Weighted, permuted, weighted
from mosaic.masks.read import Reader, every_row_sees, joined
from mosaic.masks.sinks import Column, column
from mosaic.masks.softmax import Masked, ScoresReader, Step, Weights, weights
from mosaic.masks.terms import broadcast, made
from mosaic.partition.context import Context
from mosaic.passes.normalize import merge_common, undo_repeat_kv

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """Both products, and what stands between them. ``all_see``: every row has a key to look at, or
    is 0 where it has none; ``may_be_nan``: nan, in place of 0. ``lead``: the leading dims of the
    attention, heads apart if they ever are."""

    product: Weighted
    weights: Weights
    masked: Masked
    all_see: bool
    may_be_nan: bool = False
    sinks: Column | None = None

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return self.masked.product.q, self.masked.product.k, self.product.v

    @property
    def last_lead(self) -> tuple[int, ...]:
        return tuple(self.product.weights.meta["val"].shape[:-2])

    @property
    def lead(self) -> tuple[int, ...]:
        own = [step.lead for step in (*self.masked.steps, self.sinks) if step]
        return max((self.masked.lead, *own), key=len)

    @property
    def dtype(self) -> torch.dtype:
        """That of what is added to the scores: of the operands, or float32, for scores of halves
        in that."""
        given = [x.meta["val"].dtype for x in (self.weights.scores, *(b.node for b in self.biases))]
        is_wide = given[0] == torch.float32 in given[1:]
        return torch.float32 if is_wide else self.operands[0].node.meta["val"].dtype

    @property
    def biases(self) -> tuple[Step, ...]:
        return self.masked.biases

    @property
    def is_viewed(self) -> bool:
        """Whether batches and heads are folded, or apart, in one product and not in all of it."""
        return not self.lead == self.masked.lead == self.last_lead


def raise_attention(graph: fx.Graph, context: Context) -> int:
    reader = ScoresReader(Constants())
    count = 0
    for node in list(graph.nodes):
        found = find_attention(node, reader)
        if found:
            rewrite(graph, node, found)
            count += 1
    graph.eliminate_dead_code(lambda n: n.is_impure() and n.target != aten.dropout.default)
    refuse_unread(graph)
    undo_repeat_kv(graph)
    merge_common(graph)  # the layers' masks
    return count


def refuse_unread(graph: fx.Graph) -> None:
    """Raise UnsupportedError for a call of flex or flash attention, written out by the frontend,
    that is no attention of ours: whole, it would hold all scores."""
    for node in graph.find_nodes(op="call_function", target=aten._safe_softmax.default):
        raise UnsupportedError(
            "a call of flex or flash attention changes its scores in a way that is not followed",
            where=where(node),
            reason="its score_mod may multiply a score by a number, cap it by tanh, add to it what "
            "is made of positions and tensors, and hide it, in this order",
            fix="say what is hidden in mask_mod; or write it as a product, a softmax and a "
            "product, which stays whole on every rank",
        )


def find_attention(node: fx.Node, reader: ScoresReader) -> Found | None:
    product = weighted(node)
    above = product and weights(product.weights)
    sinks = column(above, reader.constants) if above else None
    if above and sinks:
        above = replace(above, scores=sinks.scores, left_out=None)
    below = above and reader(above.scores)
    if not (product and above and below) or above.left_out is not None:
        return None
    if sinks and below.lessened:  # the sink is not
        return None
    is_zeroed = above.seen is not None
    if is_zeroed and below.seen != (above.seen,):
        return None
    constants, biases = reader.constants, below.biases
    # Reading a bias may compute it: only where it matters what it is.
    matters = is_zeroed or below.fill > -INF
    mild = not matters or all(is_mild(bias.node, constants) for bias in biases)
    if is_zeroed and not mild:
        return None
    is_certain = is_zeroed or below.fill == -INF or sinks is not None
    all_see = is_certain or sees(below, above.scores, constants)
    if not all_see and not is_exact_where_blind(below, mild, constants):
        return None
    is_nan = not (is_zeroed or above.is_safe or sinks) and below.fill == -INF
    may_be_nan = is_nan and not sees_some(below, above.scores, constants)
    found = Found(product, above, below, all_see, may_be_nan, sinks)
    return found if fits(node, found) else None


def is_exact_where_blind(below: Masked, mild: bool, constants: Constants) -> bool:
    """Whether biases, where a row sees no key, weigh either all or nothing beside what is filled:
    scores under a bias get a gradient there, and filled ones none."""
    if below.is_late or mild:
        return not below.is_late
    if below.fill > torch.finfo(below.product.q.node.meta["val"].dtype).min:
        return all(hides_fully(bias, constants) for bias in below.biases)
    return not any(may_be_lowest(bias.node, constants) for bias in below.biases)


def fits(node: fx.Node, found: Found) -> bool:
    """Whether dtypes and leading dims are those of one attention."""
    q, k, v = found.operands
    if len({x.meta["val"].dtype for x in (q.node, k.node, v.node, node)}) > 1:
        return False
    if {len(q.lead), len(k.lead)} != {len(found.masked.lead)} or len(v.lead) != len(
        found.last_lead
    ):
        return False
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return False  # einsum broadcasts what it sums over
    if not holds_fill(found, found.dtype):
        return False
    # What is viewed must not be broadcast.
    moved = (s for s in found.masked.steps if s.lead != found.lead and not s.is_broadcast)
    if not all(s.own_lead == s.lead for s in moved):
        return False
    return not found.is_viewed or (q.lead == k.lead and v.lead == found.last_lead)


def holds_fill(found: Found, dtype: torch.dtype) -> bool:
    """Whether biases of this dtype have room for the low number, where it matters."""
    if found.all_see or not found.masked.biases or not found.masked.seen:
        return True
    return found.masked.fill >= torch.finfo(dtype).min


def sees(below: Masked, scores: fx.Node, constants: Constants) -> bool:
    """Whether the masks say that every row sees a key, and biases hide none of these."""
    rows, keys = scores.meta["val"].shape[-2:]
    given = [Allowed(broadcast(s.node, len(s.lead) + 2), s.how) for s in below.seen]
    conditions = [condition for x in given for condition in Reader(constants)(x)]
    for bias in below.biases:
        if is_mild(bias.node, constants):
            continue
        found = additive(broadcast(bias.node, len(bias.lead) + 2), constants)
        is_mask = bias.how == aten.add.Tensor and found.conditions
        if not is_mask or not all(is_mild(term.node, constants) for term in found.biases):
            return False
        conditions += found.conditions
    return rows <= keys and every_row_sees(joined(conditions, constants))


def sees_some(below: Masked, scores: fx.Node, constants: Constants) -> bool:
    """Whether neither masks nor biases of -inf hide all keys of a row."""
    if not all(is_mild(bias.node, constants) for bias in below.biases):
        known = constants(below.biases[0].node)
        if below.seen or len(below.biases) > 1 or known is None:
            return False
        return bool((known > -INF).any(-1).all())
    if not below.seen:
        return True
    known = constants(below.seen[0].node)
    if len(below.seen) == 1 and known is not None:
        return bool((known if below.seen[0].how else ~known).any(-1).all())
    return sees(below, scores, constants)


# --- writing --------------------------------------------------------------------------------------


def rewrite(graph: fx.Graph, node: fx.Node, found: Found) -> None:
    lead, before, lses = found.lead, node.prev, log_sum_exps(node, found)
    with graph.inserting_before(node):
        q, k, v = (x.write(graph) for x in found.operands)
        if found.is_viewed:
            q, k, v = (led(graph, x, lead) for x in (q, k, v))
        for step in found.masked.factors:
            q = made(graph, step.how, q, meeting(graph, step, lead))
        q, mask = masks(graph, q, found)
        # Kernels take four dims, and nn.MultiheadAttention's bmm has three: one head each.
        flat = len(lead) == 1
        given = (lifted(graph, x) if flat else x for x in (q, k, v, mask))
        args = (*given, found.weights.dropout)
        options: dict[str, Any] = {"scale": found.masked.scale}
        if found.masked.scores:
            options["scores"] = found.masked.scores
        if found.sinks:
            options["sinks"] = found.sinks.write(graph, 1 if flat else lead[-1])
        if lses:
            options["lse"] = True
        target = PLAIN if options.keys() == {"scale"} else STRUCTURED
        new = insert(graph, node, target, args, options, name="attention")
        new.meta["site"] = len(graph.nodes)
        new.meta["needs_gradient"] = node.meta.get("needs_gradient", True)
        new.meta["keeps_low_rows"] = bool(found.masked.biases)
        new = apart(graph, new, lses, node.meta["val"]) if lses else new
        if found.may_be_nan:
            new = nan_where_blind(graph, new, q, k, v, mask, flat)
        new = made(graph, aten.squeeze.dim, new, 1) if flat else new
        new = led(graph, new, found.last_lead) if found.is_viewed else new
        new = permuted(graph, new, found.product.order)
    run_as(node, before)
    node.replace_all_uses_with(new)


def log_sum_exps(node: fx.Node, found: Found) -> list[fx.Node]:
    """Those of the scores that the attention at ``node`` can give, as they are read behind it."""
    below, scores = found.masked, found.weights.scores
    if below.fill > -INF or below.lessened or found.sinks:
        return []  # scores that differ from these
    modes = node.meta.get("modes")
    return [
        lse
        for lse in scores.users
        if lse.target == aten.logsumexp.default and lse.meta.get("modes") == modes
        if [dim % scores.meta["val"].ndim for dim in lse.args[1]] == [scores.meta["val"].ndim - 1]
        if all(node < reader for reader in lse.users)
    ]


def apart(graph: fx.Graph, new: fx.Node, lses: list[fx.Node], val: torch.Tensor) -> fx.Node:
    """The output of an attention without its last column, like ``val``; that is the ``lses``."""
    *lead, width = new.meta["val"].shape
    for old in lses:
        lse = made(graph, aten.select.int, new, len(lead), width - 1)
        lse = made(graph, aten.reshape.default, lse, list(old.meta["val"].shape))
        old.replace_all_uses_with(cast(graph, lse, old.meta["val"].dtype))
    return cast(graph, made(graph, aten.slice.Tensor, new, len(lead), 0, width - 1), val.dtype)


def run_as(node: fx.Node, before: fx.Node) -> None:
    """In the node's modes: a mask made under no_grad meets a bias that needs a gradient."""
    while "modes" in node.meta and (before := before.next) is not node:
        before.meta["modes"] = node.meta["modes"]


def led(graph: fx.Graph, x: fx.Node, lead: tuple[int, ...]) -> fx.Node:
    """With other leading dims."""
    shape = x.meta["val"].shape
    if tuple(shape[:-2]) == lead:
        return x
    return made(graph, aten.reshape.default, x, [*lead, *shape[-2:]])


def meeting(graph: fx.Graph, step: Step, lead: tuple[int, ...]) -> fx.Node:
    """A step's tensor, to be broadcast to scores with these leading dims."""
    if step.lead == lead:
        return step.node
    return led(graph, step.node, () if step.is_broadcast else lead)


def masks(graph: fx.Graph, q: fx.Node, found: Found) -> tuple[fx.Node, fx.Node | None]:
    """The queries, and all masks as one: boolean, or added to the scores."""
    below, bias = found.masked, total_bias(graph, found)
    if not below.seen:
        return q, bias
    seen, *others = (boolean(graph, step, found.lead) for step in below.seen)
    for other in others:
        seen = made(graph, aten.logical_and.default, seen, other)
    mask = kept = seen = of_pairs(graph, seen)
    if bias is not None:
        mask = made(graph, aten.where.ScalarOther, seen, bias, -INF)
    if found.all_see:
        return q, mask
    if bias is not None:
        above = made(graph, aten.gt.Scalar, mask, below.fill)
        mask = made(graph, aten.where.ScalarOther, seen, bias, below.fill)
        seen = above
    sees = made(graph, aten.any.dim, seen, -1, True)
    if bias is not None:  # or nothing is filled: biases alone hide the row
        sees = made(graph, aten.logical_or.default, sees, made(graph, aten.all.dim, kept, -1, True))
    q = made(graph, aten.where.ScalarOther, sees, q, 0.0)
    if bias is None:
        unseen = made(graph, aten.logical_not.default, sees)
        mask = made(graph, aten.logical_or.default, mask, unseen)
    return q, mask


def nan_where_blind(
    graph: fx.Graph, out: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node, flat: bool
) -> fx.Node:
    """``out``, nan in rows that see no key. So are the gradients of all values then and, where the
    mask is added to the scores, those of these queries and of all keys."""
    is_added = mask.meta["val"].dtype != torch.bool
    seen = made(graph, aten.gt.Scalar, mask, -INF) if is_added else mask
    sees = made(graph, aten.any.dim, seen, -1, True)
    parts = [made(graph, aten.sum.dim_IntList, v, [-2], True)]
    if is_added:
        parts.append(made(graph, aten.sum.dim_IntList, q, [-1], True))
        parts.append(made(graph, aten.sum.dim_IntList, k, [-2, -1], True))
    total = parts[0]
    for part in parts[1:]:
        total = made(graph, aten.add.Tensor, total, part)
    blind = made(graph, aten.logical_not.default, sees)
    if flat:
        total, blind = lifted(graph, total), lifted(graph, blind)
    factor = cast(graph, blind, out.meta["val"].dtype)
    factor = made(graph, aten.masked_fill.Scalar, factor, blind, float("nan"))  # else 0
    return made(graph, aten.where.self, blind, made(graph, aten.mul.Tensor, factor, total), out)


def total_bias(graph: fx.Graph, found: Found) -> fx.Node | None:
    bias: fx.Node | None = None
    for step in found.biases:
        one = cast(graph, meeting(graph, step, found.lead), found.dtype)
        one = made(graph, aten.neg.default, one) if step.how == aten.sub.Tensor else one
        one = one if step.scale == 1 else made(graph, aten.mul.Tensor, one, step.scale)
        bias = one if bias is None else made(graph, aten.add.Tensor, bias, one)
    return None if bias is None else of_pairs(graph, bias)


def of_pairs(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """At least (queries, keys), or (1, keys)."""
    while mask.meta["val"].ndim < 2:
        mask = made(graph, aten.unsqueeze.default, mask, 0)
    return mask


def cast(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """As adding it to the scores does."""
    same = x.meta["val"].dtype == dtype
    return x if same else made(graph, aten._to_copy.default, x, dtype=dtype)


def boolean(graph: fx.Graph, step: Step, lead: tuple[int, ...]) -> fx.Node:
    node = meeting(graph, step, lead)
    return node if step.how else made(graph, aten.logical_not.default, node)


def lifted(graph: fx.Graph, x: fx.Node | None) -> fx.Node | None:
    """``(n, s, d)`` as ``(n, 1, s, d)``; a mask of two dims broadcasts as it is."""
    if x is None or x.meta["val"].ndim < 3:
        return x
    return made(graph, aten.unsqueeze.default, x, 1)
