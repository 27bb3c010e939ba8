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
from torch.overrides import TorchFunctionMode

from mosaic.torch_private import (
    FakeTensorMode,
    flex_vmap,
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
    sizes, device = scores.shape, q.device
    given = scores, *call.score_buffers
    scores = run(spelled(call.score_mod, sizes, device, given, has_score=True), *given)
    given = call.mask_buffers
    seen = run(spelled(call.mask_mod, sizes, device, given), *given)
    scores = torch.where(seen, scores, -math.inf)
    out = torch._safe_softmax(scores, -1).to(q.dtype) @ v
    return out, scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def spelled(
    mod: fx.GraphModule,
    sizes: Sequence[int],
    device: torch.device,
    operands: Sequence[Any],
    has_score: bool = False,
) -> fx.GraphModule:
    """``mod(score, b, h, i, j, *buffers)`` for all batches, heads, queries and keys at once, as
    plain ops on its operands: the scores, if it has any, and the buffers."""
    before, behind = operands[:has_score], operands[has_score:]
    every = flex_vmap(mod, prefix=(0,) * len(before), suffix=(None,) * len(behind))

    def run(*operands: Any) -> Any:
        positions = (torch.arange(n, device=device) for n in sizes)
        with ByIndex():
            return every(*operands[:has_score], *positions, *operands[has_score:])

    with without_modes(), functorch_restored(), FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(run)(*pytree.tree_map_only(Tensor, blank, tuple(operands)))


class ByIndex(TorchFunctionMode):
    """``x[i, 0]`` of a position i, a tensor without dims: not a look at its number, but an op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = pytree.tree_leaves(args[1]) if func is Tensor.__getitem__ else ()
        are_known = all(type(x) is int or is_number(x) for x in indices)
        if not are_known or not any(isinstance(x, Tensor) for x in indices):
            return func(*args, **(kwargs or {}))
        x, given = args[0], [i for i in indices if isinstance(i, Tensor)]
        for dim, i in reversed(list(enumerate(indices))):
            x = x if isinstance(i, Tensor) else x.select(dim, i)
        return torch.ops.aten.index(x, given)


def is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.ndim


def blank(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
