"""Every rank has all the keys it attends to: nothing is communicated.

With sharded queries each rank's dk and dv are its queries' share: whoever made the keys whole
``enter``s them, which adds the shares up.
"""

from __future__ import annotations

from torch import Tensor

from mosaic.attention.attend import attend, attend_backward, visit
from mosaic.attention.kernels import Gradients
from mosaic.attention.merge import Partial
from mosaic.attention.plan import AttentionPlan


def forward(q, k, v, mask: Tensor | None, seed: Tensor | None, plan: AttentionPlan) -> Partial:
    """out (batch, heads, seq, head_dim) and lse (batch, heads, seq) of this rank's queries."""
    return attend(q, k, v, visit(plan, plan.key.ranks[plan.rank], q, mask, seed))


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
    """dq, and this rank's queries' share of dk and dv."""
    here = visit(plan, plan.key.ranks[plan.rank], q, mask, seed)
    return attend_backward(dout, q, k, v, out, lse, here, need_dmask)
