"""Cross-entropy of tokens against a head, block by block: no tensor of tokens x classes is kept.

Forward goes over blocks of tokens and keeps the log-sum-exp (LSE) of each token's logits. Backward
goes over blocks of classes: it makes their logits again, and with the LSE their probabilities, so
that the gradient of each row of the head is one product, in its own dtype. That is one product more
than with logits, and of memory one block.

With l_c the logits of a token, t its target, w the classes' weights and s the label smoothing:

    loss    =  (1 - s) w_t (lse - l_t)  +  s/C sum_c w_c (lse - l_c)
    dl_c    =  dloss (softmax_c ((1 - s) w_t + s/C sum w) - (1 - s) w_t [c = t] - s/C w_c)

as ``torch.nn.functional.cross_entropy`` has it before its reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.losses.steps import decode

#: Logits of a block: 128 MiB in bfloat16. Of very many tokens a block has more, so that there are
#: at most MOST of them, and each is a product that a GPU is good at.
LARGEST, MOST = 2**26, 64


class How(NamedTuple):
    """``steps``: what is done to logits (``steps.py``). ``ignored``: the target without a loss.
    ``smoothing``: that of labels, in 0..1."""

    steps: str
    ignored: int
    smoothing: float


class Rows(NamedTuple):
    """What backward knows of the tokens, beside their hidden states."""

    target: Tensor
    lse: Tensor
    dlosses: Tensor


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    head: bool
    bias: bool


def forward(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    how: How,
) -> tuple[Tensor, Tensor]:
    """The tokens' losses and LSEs; see ``op.token_losses``."""
    losses = target.new_empty(target.shape, dtype=dtype_of(hidden, how))
    lse, step = torch.empty_like(losses), fused(losses_of, hidden.device)
    for part in blocks(hidden.shape[0], head.shape[0]):
        logits = F.linear(hidden[part], head, bias)
        losses[part], lse[part] = step(logits, target[part], weight, how)
    return losses, lse


def backward(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Rows,
    weight: Tensor | None,
    how: How,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, head and bias; of one that is not wanted without an element."""
    tokens, classes = hidden.shape[0], head.shape[0]
    parts = [*blocks(classes, tokens)]
    dtype = accumulator(hidden.dtype) if len(parts) > 1 else hidden.dtype
    dhidden = hidden.new_zeros(hidden.shape if wanted.hidden else [0], dtype=dtype)
    dhead = head.new_empty(head.shape if wanted.head else [0])
    dbias = head.new_empty([classes] if wanted.bias else [0])
    step = fused(dlogits_of, hidden.device)
    mean = hidden.new_ones(()) if weight is None else weight.mean()
    for part in parts:
        logits = F.linear(hidden, head[part], None if bias is None else bias[part])
        columns = torch.arange(part.start, part.stop, device=hidden.device)
        dlogits = step(logits, columns, rows, weight, mean, how, classes)
        if wanted.hidden:
            add_product(dhidden, dlogits, head[part])
        if wanted.head:
            torch.mm(dlogits.t(), hidden, out=dhead[part])
        if wanted.bias:
            dbias[part] = dlogits.sum(0)
    return dhidden.to(hidden.dtype), dhead, dbias


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x @ y to ``total``, which may be of a wider dtype: a GPU's product adds to it itself."""
    if total.is_cuda and total.dtype != x.dtype:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    else:
        total += x @ y


def dtype_of(hidden: Tensor, how: How) -> torch.dtype:
    """Of losses and LSEs."""
    casts = [step.value for step in decode(how.steps) if step.op == "to"]
    return accumulator(getattr(torch, casts[-1]) if casts else hidden.dtype)


def blocks(length: int, other: int) -> Iterator[slice]:
    """``length`` in equal stretches, so that each has at most LARGEST logits beside ``other``."""
    most = max(LARGEST, -(-length * other // MOST))
    count = -(-length // max(1, most // max(1, other)))
    size = max(1, -(-length // max(1, count)))
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


# --- one block ----------------------------------------------------------------------------------


def losses_of(
    logits: Tensor, target: Tensor, weight: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """Losses and LSEs (tokens) of logits (tokens, classes)."""
    for step in decode(how.steps):
        logits = step(logits)
    logits = logits.to(accumulator(logits.dtype))
    lse, used = logits.logsumexp(-1), target != how.ignored
    target = torch.where(used, target, 0)
    loss = lse - logits.gather(-1, target[:, None])[:, 0]
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss = loss * weight[target]
    if how.smoothing:
        rest = lse[:, None] - logits
        rest = (rest if weight is None else rest * weight).mean(-1)
        loss = (1 - how.smoothing) * loss + how.smoothing * rest
    return torch.where(used, loss, 0), lse


def dlogits_of(
    logits: Tensor,
    columns: Tensor,
    rows: Rows,
    weight: Tensor | None,
    mean: Tensor,
    how: How,
    classes: int,
) -> Tensor:
    """The gradient of logits (tokens, columns) before all steps, in their dtype; ``columns``: their
    classes. ``mean``: of all classes' weights."""
    steps, values = decode(how.steps), [logits]
    for step in steps:
        values.append(step(values[-1]))
    shares = (values[-1].to(rows.lse.dtype) - rows.lse[:, None]).exp()
    used = rows.target != how.ignored
    loss = torch.where(used, rows.dlosses, 0)[:, None]
    hit, of_target = loss * (1 - how.smoothing), rows.target[:, None] == columns
    if weight is not None:
        hit = hit * weight.to(loss.dtype)[torch.where(used, rows.target, 0)][:, None]
    smooth = loss * how.smoothing
    of_columns = 1 / classes if weight is None else weight[columns].to(loss.dtype) / classes
    dout = shares * (hit + smooth * mean.to(loss.dtype))
    dout = dout - torch.where(of_target, hit, 0) - smooth * of_columns
    dout = torch.where(used[:, None], dout, 0).to(values[-1].dtype)
    for step, before, after in zip(steps[::-1], values[-2::-1], values[:0:-1], strict=True):
        dout = step.gradient(dout, before, after)
    return dout


def fused(fn: Any, device: torch.device) -> Any:
    """One kernel of what a block does between its products, where there is a compiler for it."""
    return compiled(fn) if device.type == "cuda" and find_spec("triton") else fn


@cache
def compiled(fn: Any) -> Any:
    return torch.compile(fn, dynamic=True)
