"""``flex_attention`` as what it is defined to be, in plain ops.

    flex_attention(q, k, v, score_mod, block_mask, scale)
    ->   scores = score_mod(q @ k.T * scale, b, h, i, j)          for all b, h, i, j at once
         out = safe_softmax(where(mask_mod(b, h, i, j), scores, -inf)) @ v

``passes/raise_attention.py`` finds the attention in it, ``analyze_masks`` what its mask means: none
of these tensors of queries x keys is left then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mosaic.torch_private import (
    FakeTensorMode,
    for_every_pair,
    functorch_restored,
    make_fx,
    pytree,
    without_modes,
)


class Call(NamedTuple):
    """A call of ``torch.ops.higher_order.flex_attention``, as Dynamo writes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: fx.GraphModule
    block_mask: tuple[Any, ...]
    scale: float
    kernel_options: dict[str, Any]
    score_buffers: tuple[Any, ...] = ()
    mask_buffers: tuple[Any, ...] = ()

    @property
    def mask_mod(self) -> fx.GraphModule:
        found: fx.GraphModule = self.block_mask[-1]
        return found


def written_out(call: Call, run: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the scores' log-sum-exp and maximum, both to base 2. ``run(body, *operands)``
    runs a graph of plain ops."""
    q, k, v = call.query, call.key, call.value
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).to(working) * call.scale
    sizes = tuple(scores.shape)
    scores = run(spelled(call.score_mod, sizes, (scores,), call.score_buffers), scores, *call.score_buffers)
    seen = run(spelled(call.mask_mod, sizes, (), call.mask_buffers), *call.mask_buffers)
    scores = torch.where(seen, scores, -math.inf)
    out = torch._safe_softmax(scores, -1).to(q.dtype) @ v
    lse = scores.logsumexp(-1) / math.log(2)
    return out, lse, scores.amax(-1) / math.log(2)


def spelled(
    mod: fx.GraphModule, sizes: Sequence[int], scores: Sequence[Tensor], buffers: Sequence[Any]
) -> fx.GraphModule:
    """``mod`` for all batches, heads, queries and keys at once: a graph of plain ops."""
    device = next(x.device for x in (*scores, *buffers) if isinstance(x, Tensor)) if scores or any(isinstance(x, Tensor) for x in buffers) else "cpu"

    def every(*operands: Any) -> Any:
        positions = (torch.arange(n, device=device) for n in sizes)
        given, rest = operands[: len(scores)], operands[len(scores) :]
        return for_every_pair(mod, len(scores), len(rest))(*given, *positions, *rest)

    with without_modes(), functorch_restored(), FakeTensorMode(allow_non_fake_inputs=True):
        blanks = pytree.tree_map_only(torch.Tensor, blank, (*scores, *buffers))
        return make_fx(every)(*blanks)


def blank(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
