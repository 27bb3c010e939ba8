"""The op that stands for a sharded attention in a graph, until the lowering.

It is opaque to AOTAutograd and has a backward of its own. Differentiating through a merge would be
silently wrong, as the log-sum-exp of a kernel has no gradient; and collectives that the partitioner
sees are always saved. So q, k, v, out and lse are all that is kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.attention import program
from mosaic.attention.attend import Inputs
from mosaic.attention.heads import exchange_of
from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.moves import fresh

decode = lru_cache(maxsize=None)(AttentionPlan.decode)


class Calls(NamedTuple):
    """The strings of the ops that one attention is: of the attention itself, and for Ulysses of the
    exchanges before and after it, with the heads that this rank then has."""

    attention: str
    there: str = ""
    back: str = ""
    heads: tuple[int, int] = (0, 0)


def calls_of(plan: AttentionPlan, heads: int, kv_heads: int) -> Calls:
    """For q with ``heads`` and k, v with ``kv_heads``."""
    if plan.way.heads == 1:
        return Calls(plan.encode())
    there = exchange_of(plan, [(plan.query, heads), (plan.key, kv_heads), (plan.key, kv_heads)])
    back = exchange_of(plan, [(plan.query, heads)])
    mine = there.heads_of(there.slot, heads)
    inner = plan.after_heads(heads).encode()
    return Calls(inner, there.encode(), back.encode(), (mine.start, mine.stop))


def sharded_attention(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, calls: Calls) -> Tensor:
    """out (batch, heads, seq, v_dim) of this rank's queries: the op, and for Ulysses the exchange
    of sequence for heads around it. Differentiable; arguments as those of ``attention``."""
    mask, *rest = inputs
    if not calls.there:
        return torch.ops.mosaic.attention(q, k, v, mask, *rest, calls.attention)[0]
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, slice(*calls.heads)]
    q, k, v = torch.ops.mosaic.exchange_heads([q, k, v], calls.there, True)
    out = torch.ops.mosaic.attention(q, k, v, mask, *rest, calls.attention)[0]
    return torch.ops.mosaic.exchange_heads([out], calls.back, False)[0]


def forward_program(
    q, k, v, mask, query_documents, key_documents, seed, plan: str
) -> tuple[Tensor, Tensor]:
    """``attention`` in aten ops and collectives: what the op runs and the lowering traces."""
    inputs = Inputs(mask, query_documents, key_documents, seed)
    out, lse = program.forward(q, k, v, inputs, decode(plan))
    return out.to(q.dtype).contiguous(), lse.contiguous()


def backward_program(
    dout, q, k, v, mask, query_documents, key_documents, seed, out, lse, plan: str, need_dmask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``attention_backward`` in aten ops and functional collectives."""
    inputs = Inputs(mask, query_documents, key_documents, seed)
    *grads, dmask = program.backward(dout, q, k, v, inputs, out, lse, decode(plan), need_dmask)
    dq, dk, dv = (grad.to(x.dtype).contiguous() for grad, x in zip(grads, (q, k, v), strict=True))
    if dmask is None or mask is None:
        return dq, dk, dv, q.new_empty([0])
    return dq, dk, dv, dmask.to(mask.dtype).contiguous()


@torch.library.custom_op(
    "mosaic::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? seed, str plan) -> (Tensor, Tensor)",
)
def attention(q, k, v, mask, query_documents, key_documents, seed, plan):
    """Attention of this rank's queries over all ranks' keys.

    q (batch, heads, seq, head_dim), k (batch, kv_heads, keys, head_dim), v (batch, kv_heads, keys,
    v_dim): local shards. ``mask`` (batch|1, heads|1, seq|1, all keys|1): this rank's rows, boolean
    or added to the scores. ``query_documents`` (batch|1, all queries) and ``key_documents``
    (batch|1, all keys): ids, equal ones attend. ``seed``: int64 scalar, for dropout. ``plan``: an
    encoded ``AttentionPlan``. Gives out (batch, heads, seq, v_dim) and lse (batch, heads, seq).
    """
    inputs = (q, k, v, mask, query_documents, key_documents, seed)
    return fresh(forward_program(*inputs, plan), inputs)


@attention.register_fake
def _(q, k, v, mask, query_documents, key_documents, seed, plan):
    out = q.new_empty([*q.shape[:3], v.shape[3]])
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "mosaic::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? seed, Tensor out, Tensor lse, str plan, bool need_dmask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(
    dout, q, k, v, mask, query_documents, key_documents, seed, out, lse, plan, need_dmask
):
    """dq, dk, dv and dmask, each like its input (dmask has no element where it is not needed)."""
    inputs = (dout, q, k, v, mask, query_documents, key_documents, seed, out, lse)
    return fresh(backward_program(*inputs, plan, need_dmask), inputs)


@attention_backward.register_fake
def _(dout, q, k, v, mask, query_documents, key_documents, seed, out, lse, plan, need_dmask):
    dmask = mask.new_empty(mask.shape) if need_dmask else q.new_empty([0])
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dmask)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.plan = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx, dout, dlse):
    if dout is None:
        return (None,) * 8
    *inputs, out, lse = ctx.saved_tensors
    mask = inputs[3]
    need_dmask = mask is not None and mask.is_floating_point() and ctx.needs_input_grad[3]
    dq, dk, dv, dmask = torch.ops.mosaic.attention_backward(
        dout, *inputs, out, lse, ctx.plan, need_dmask
    )
    return dq, dk, dv, dmask if need_dmask else None, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup)
