"""Keys and values visit: p - 1 shifts to the next rank, each behind the kernel of the last chunk.

Needs the least memory, two chunks. Nothing is kept for backward but q, k, v, out and lse: keys and
values go round again, and each chunk's dK and dV travel with it, one hop further, home
(research/attention.md 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.attend import attend, attend_backward, visit
from mosaic.attention.kernels import Gradients
from mosaic.attention.merge import Partial
from mosaic.attention.plan import AttentionPlan
from mosaic.layout import Run
from mosaic.moves import all_to_all, take_runs, wait


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """One flat buffer: one collective moves both."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpack(kv: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(batch, kv_heads, length, head_dim) each; k and v give the other sizes."""
    shapes = [[*x.shape[:2], length, x.shape[3]] for x in (k, v)]
    middle = k.shape[0] * k.shape[1] * length * k.shape[3]
    return kv[:middle].view(shapes[0]), kv[middle:].view(shapes[1])


def _shift(kv: Tensor, k: Tensor, v: Tensor, owner: int, plan: AttentionPlan) -> Tensor:
    """Start sending ``owner``'s chunk to the next rank, and receiving the previous rank's."""
    per_key = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    send, receive = [0] * plan.p, [0] * plan.p
    send[(plan.rank + 1) % plan.p] = plan.key.lengths[owner] * per_key
    receive[(plan.rank - 1) % plan.p] = plan.key.lengths[(owner - 1) % plan.p] * per_key
    return all_to_all(kv, receive, send, plan.group)


def forward(q, k, v, mask: Tensor | None, seed: Tensor | None, plan: AttentionPlan) -> Partial:
    """out (batch, heads, seq, head_dim) and lse (batch, heads, seq) of this rank's queries."""
    kv = _pack(k, v)
    partial: Partial | None = None
    for step in range(plan.p):
        owner, last = (plan.rank - step) % plan.p, step == plan.p - 1
        coming = kv if last else _shift(kv, k, v, owner, plan)
        here = visit(plan, plan.key.ranks[owner], q, mask, seed)
        partial = attend(q, *_unpack(kv, k, v, plan.key.lengths[owner]), here, partial)
        kv = coming if last else wait(coming)
    assert partial is not None
    return partial


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
    kv = _pack(k, v)
    dq: Tensor | None = None
    dkv: Tensor | None = None
    dmasks: dict[int, Tensor] = {}
    for step in range(plan.p):
        owner, last = (plan.rank - step) % plan.p, step == plan.p - 1
        coming = kv if last else _shift(kv, k, v, owner, plan)
        here = visit(plan, plan.key.ranks[owner], q, mask, seed)
        chunk = _unpack(kv, k, v, plan.key.lengths[owner])
        dq_part, dk, dv, dmask = attend_backward(dout, q, *chunk, out, lse, here, need_dmask)
        if dmask is not None:
            dmasks[owner] = dmask
        dq = dq_part if dq is None else dq + dq_part
        part = _pack(dk, dv)
        dkv = part if dkv is None else wait(dkv) + part
        if plan.p > 1:
            dkv = _shift(dkv, k, v, owner, plan)
        kv = coming if last else wait(coming)
    assert dq is not None and dkv is not None
    home = dkv if plan.p == 1 else wait(dkv)
    dmask = None if mask is None or not need_dmask else _mask_gradient(dmasks, mask, plan)
    return (dq, *_unpack(home, k, v, plan.key.lengths[plan.rank]), dmask)


def _mask_gradient(dmasks: dict[int, Tensor], mask: Tensor, plan: AttentionPlan) -> Tensor:
    """The chunks' columns side by side in global order; their sum where one column serves all."""
    chunks = [dmasks[owner] for owner in range(plan.p)]
    if mask.shape[3] == 1:
        return torch.stack(chunks).sum(0)
    starts = [sum(plan.key.lengths[:owner]) for owner in range(plan.p)]
    runs = [Run(starts[r] + a, starts[r] + b) for r, (a, b, _) in plan.key.gather_order()]
    return take_runs(torch.cat(chunks, 3), runs, 3)
