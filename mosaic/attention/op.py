"""The op that stands for a sharded attention in a graph, until the lowering.

It is opaque to AOTAutograd and has a backward of its own. Differentiating through a merge would be
silently wrong, as the log-sum-exp of a kernel has no gradient; and collectives that the partitioner
sees are always saved. So q, k, v, out and lse are all that is kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention import program
from mosaic.attention.heads import exchange_of
from mosaic.attention.kernels.kernel import narrowed
from mosaic.attention.merge import unwritten
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.shift import shift_of
from mosaic.attention.sinks import sinks_gradient, with_sinks
from mosaic.attention.tiles import of_heads
from mosaic.attention.visit import Inputs
from mosaic.runtime.comm import fresh

decode = lru_cache(maxsize=4096)(AttentionPlan.decode)


class Calls(NamedTuple):
    """The strings of the ops that one attention is: of the attention itself, and for Ulysses of the
    exchanges before and after it, with the heads that this rank then has."""

    attention: str
    there: str = ""
    back: str = ""
    heads: tuple[int, int] = (0, 0)


def calls_of(plan: AttentionPlan, heads: int, kv_heads: int) -> Calls:
    """For q with ``heads`` and k, v with ``kv_heads``."""
    if plan.strategy.heads == 1:
        return Calls(plan.encode())
    there = exchange_of(plan, [(plan.query, heads), (plan.key, kv_heads), (plan.key, kv_heads)])
    back = exchange_of(plan, [(plan.query, heads)])
    mine = there.heads_of(there.slot, heads)
    inner = plan.after_heads(heads).encode()
    return Calls(inner, there.encode(), back.encode(), (mine.start, mine.stop))


def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, calls: Calls, has_lse: bool = False
) -> Tensor:
    """out (batch, heads, seq, v_dim) of this rank's queries: the op, and for Ulysses the exchange
    of sequence for heads around it. Differentiable; arguments as those of ``attention``.
    ``has_lse``: with the log-sum-exp as one more column, less what was ``taken_off``."""
    inputs = inputs._replace(leaves=list(inputs.leaves))
    if not calls.there:
        return attended(q, k, v, inputs, calls.attention, has_lse)
    mask = None if inputs.mask is None else of_heads(inputs.mask, *calls.heads)
    leaves = [of_heads(leaf, *calls.heads) for leaf in inputs.leaves]
    sinks = None if inputs.sinks is None else inputs.sinks[slice(*calls.heads)]
    inputs = inputs._replace(mask=mask, leaves=leaves, sinks=sinks)
    q, k, v = torch.ops.mosaic.exchange_heads([q, k, v], calls.there, True)
    out = attended(q, k, v, inputs, calls.attention, has_lse)
    return torch.ops.mosaic.exchange_heads([out], calls.back, False)[0]


def attended(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, plan: str, has_lse: bool) -> Tensor:
    out, lse = torch.ops.mosaic.attention(q, k, v, *inputs, plan)
    return torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1) if has_lse else out


def taken_off(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, plan: str) -> Tensor | None:
    """What an attention's log-sum-exp lacks, as numbers to add to (batch, heads, seq, v_dim + 1):
    it is of scores less the largest bias of their row. None: nothing. ``plan``: before any exchange
    of heads. A constant, whatever ``inputs`` learns."""
    known = decode(plan)
    shift = shift_of(known, known.query.ranks[known.rank], q, (k, v), inputs)
    return None if shift is None else F.pad(shift, (v.shape[3], 0))


def forward_program(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    """``attention`` in aten ops and collectives: what the op runs and the lowering traces."""
    *inputs, plan = rest
    given = Inputs(*inputs)
    out, lse = program.forward(q, k, v, given, decode(plan))
    if given.sinks is not None:
        out, lse = with_sinks((out, lse), given.sinks)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def backward_program(dout, q, k, v, *rest) -> list[Tensor]:
    """``attention_backward`` in aten ops and functional collectives."""
    *inputs, out, lse, plan, need_dmask = rest
    *grads, dmasks = program.backward(
        dout, q, k, v, Inputs(*inputs), out, lse, decode(plan), need_dmask
    )
    grads = [grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)]
    return [grad.contiguous() for grad in (*grads, *dmasks)]


@torch.library.custom_op(
    "mosaic::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? seed, Tensor[] leaves, Tensor? sinks, str plan, *, "
    "int number=0) -> (Tensor, Tensor)",
)
def attention(
    q, k, v, mask, query_documents, key_documents, seed, leaves, sinks, plan, *, number=0
):
    """Attention of this rank's queries over all ranks' keys.

    q (batch, heads, seq, head_dim), k (batch, kv_heads, keys, head_dim), v (batch, kv_heads, keys,
    v_dim): local shards. ``mask`` (batch|1, heads|1, seq|1, all keys|1): this rank's rows, boolean
    or added to the scores. ``query_documents`` (batch|1, all queries) and ``key_documents``
    (batch|1, all keys): ids, equal ones attend. ``seed``: int64 scalar, for dropout. ``leaves``:
    those of the plan's programs. ``sinks`` (heads): the score of one more key of value 0. ``plan``:
    an encoded ``AttentionPlan``. Gives out (batch, heads, seq, v_dim) and lse (batch, heads, seq).
    """
    inputs = (q, k, v, mask, query_documents, key_documents, seed)
    return fresh(forward_program(*inputs, leaves, sinks, plan), (*inputs, *leaves))


@attention.register_fake
def _(q, k, v, *rest, number=0):
    return unwritten(q, v)


@torch.library.custom_op(
    "mosaic::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? seed, Tensor[] leaves, Tensor? sinks, Tensor out, Tensor lse, "
    "str plan, bool need_dmask, *, int number=0) -> Tensor[]",
)
def attention_backward(dout, q, k, v, *rest, number=0):
    """dq, dk, dv, each like its input; with ``need_dmask`` that of a mask that is added, and one
    for each leaf (of no element where it is not learned). That of sinks needs no kernel: see
    ``_backward``."""
    mask, query_documents, key_documents, seed, leaves, _, out, lse, _, _ = rest
    given = (dout, q, k, v, mask, query_documents, key_documents, seed, *leaves, out, lse)
    return list(fresh(backward_program(dout, q, k, v, *rest), given))


@attention_backward.register_fake
def _(dout, q, k, v, mask, *rest, number=0):
    *_, leaves, _, _, _, plan, need_dmask = rest
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    if not need_dmask:
        return grads
    if mask is not None and mask.is_floating_point():
        grads.append(mask.new_empty(mask.shape))
    learned = decode(plan).learned
    return [*grads, *(x.new_empty(x.shape if i in learned else [0]) for i, x in enumerate(leaves))]


def _setup(ctx, inputs, keyword_only_inputs, output) -> None:
    *tensors, leaves, sinks, ctx.plan = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, sinks, *leaves, *output)


def with_dlse(dlse, dout, q, k, v, out) -> tuple[Tensor, ...]:
    """dout, q, k, v and out with one more column, which brings in the gradient of lse.

    Kernels make scores' gradients of dout @ v.T - rowsum(dout * out), and dlse is to be added: so
    it is taken off those sums, by -dlse in dout beside 1 in out. v has 0 there; so have q and k,
    which are as wide for kernels that want it.
    """
    dout = torch.cat([dout, -dlse.unsqueeze(-1).to(dout.dtype)], -1)
    return dout, *(F.pad(x, (0, 1)) for x in (q, k, v)), F.pad(out, (0, 1), value=1.0)


def _backward(ctx, dout, dlse):
    q, k, v, *inputs, out, lse = ctx.saved_tensors
    inputs, sinks, leaves = inputs[:4], inputs[4], inputs[5:]
    dmask, dleaves = None, [None] * len(leaves)
    if dout is None and dlse is None:
        return (*[None] * 7, dleaves, None, None)
    dout = torch.zeros_like(out) if dout is None else dout
    dims = [x.shape[3] for x in (q, k, v)]
    if dlse is not None:
        dout, q, k, v, out = with_dlse(dlse, dout, q, k, v, out)
    mask, learned = inputs[0], decode(ctx.plan).learned if leaves else ()
    needed = ctx.needs_input_grad
    is_added = mask is not None and mask.is_floating_point()
    need_dmask = any(needed[7][i] for i in learned) or (is_added and needed[3])
    dq, dk, dv, *rest = torch.ops.mosaic.attention_backward(
        dout, q, k, v, *inputs, leaves, sinks, out, lse, ctx.plan, need_dmask
    )
    dq, dk, dv = (narrowed(x, dim) for x, dim in zip((dq, dk, dv), dims, strict=True))
    dsinks = sinks_gradient(dout, out, lse, sinks) if needed[8] else None
    if need_dmask:
        dmask = rest.pop(0) if is_added else None
        dleaves = [grad if i in learned else None for i, grad in enumerate(rest)]
    return dq, dk, dv, dmask, None, None, None, dleaves, dsinks, None


attention.register_autograd(_backward, setup_context=_setup)
