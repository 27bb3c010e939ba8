"""Keys and values are gathered at once, in global order: one collective, and few large kernels.

The fastest method inside a node, where memory holds all keys of one layer. Forward: one all-gather
of packed K and V. Backward: the same, and one reduce-scatter of dK and dV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.attend import attend, attend_backward, visit
from mosaic.attention.kernels import Gradients
from mosaic.attention.merge import Partial
from mosaic.attention.plan import AttentionPlan
from mosaic.layout import Interval, Place, Shard
from mosaic.moves import gather_view, reduce_scatter_program


def _shard(plan: AttentionPlan) -> Shard:
    return Shard(Place(plan.key, 2), plan.rank, plan.group)


def _everything(k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """All keys and values, in global order."""
    together = gather_view(torch.cat([k, v], -1), _shard(plan))
    keys, values = together.split([k.shape[-1], v.shape[-1]], -1)
    return keys, values


def forward(q, k, v, mask: Tensor | None, seed: Tensor | None, plan: AttentionPlan) -> Partial:
    """out (batch, heads, seq, head_dim) and lse (batch, heads, seq) of this rank's queries."""
    here = visit(plan, (Interval(0, plan.key.n),), q, mask, seed)
    return attend(q, *_everything(k, v, plan), here)


def backward(
    dout,
    q,
    k,
    v,
    mask: Tensor | None,
    seed: Tensor | None,
    out,
    lse,
    plan: AttentionPlan,
    need_dmask: bool,
) -> Gradients:
    """dq, dk, dv of this rank, and the gradient of its mask rows."""
    here = visit(plan, (Interval(0, plan.key.n),), q, mask, seed)
    whole = _everything(k, v, plan)
    dq, dk, dv, dmask = attend_backward(dout, q, *whole, out, lse, here, need_dmask)
    dkv = reduce_scatter_program(torch.cat([dk, dv], -1), _shard(plan))
    return (dq, *dkv.split([k.shape[-1], v.shape[-1]], -1), dmask)
