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

from mosaic.frontend.block_masks import Blocks
from mosaic.frontend.fused import attended
from mosaic.frontend.vmapped import as_plain_ops
from mosaic.torch_private import (
    flex_vmap,
    lists_of_blocks,
    pytree,
)

#: A block of all queries and keys: of a call without a BlockMask.
LARGEST = 2**30


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

    @property
    def block(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        queries, keys = self.block_mask[-3:-1]
        return queries, keys

    @property
    def lists(self) -> list[Tensor]:
        """How many blocks of keys, and which, each block of queries looks at; then of those that
        it sees whole."""
        return [x for x in self.block_mask[2:6] if x is not None]


def written_out(
    call: Call, run: Callable[..., Any], known: list[Blocks]
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the scores' log-sum-exp and maximum, both to base 2. ``run(body, *operands)``
    runs a graph of plain ops; what BlockMasks say by their lists is noted in ``known``."""
    q, k = call.query, call.key
    every, device = [range(n) for n in (*q.shape[:3], k.shape[2])], q.device

    def change(scores: Tensor) -> Tensor:
        given = scores, *call.score_buffers
        found: Tensor = run(spelled(call.score_mod, every, device, given, has_score=True), *given)
        return found

    seen = run(spelled(call.mask_mod, every, device, call.mask_buffers), *call.mask_buffers)
    seen = beside_lists(seen, call, run, known)
    out, scores = attended(q, k, call.value, call.scale, change, seen)
    return out, scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def beside_lists(seen: Tensor, call: Call, run: Callable[..., Any], known: list[Blocks]) -> Tensor:
    """``seen``, marked with the lists of its BlockMask, and those that create_block_mask makes."""
    lists, buffers = call.lists, call.mask_buffers
    lengths, device = (seen.shape[2], seen.shape[3]), seen.device
    made: Sequence[Tensor] = ()
    if max(call.block) < LARGEST:
        every = [range(n) for n in (*lists[0].shape[:2], *lengths)]
        small = run(spelled(call.mask_mod, every, device, buffers), *buffers)
        made = lists_of_blocks(small, call.block, len(lists) > 2)
    tensors = [x for x in buffers if isinstance(x, Tensor)]
    numbers = [None if isinstance(x, Tensor) else x for x in buffers]
    mod, batches, heads = call.mask_mod, *seen.shape[:2]

    def part(start: int, stop: int, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        filled = [next(given) if x is None else x for x in numbers]
        every = [range(batches), range(heads), range(start, stop), range(lengths[1])]
        return at(mod, every, device, filled)

    has_constants = any(n.op == "get_attr" for n in mod.graph.nodes)
    text = "" if has_constants else f"{mod.code} {numbers}"
    known.append(Blocks(text, part, lengths, call.block))
    return torch.ops.mosaic.block_mask(seen, lists, made, tensors, len(known) - 1)


def spelled(
    mod: fx.GraphModule,
    every: Sequence[range],
    device: torch.device,
    operands: Sequence[Any],
    has_score: bool = False,
) -> fx.GraphModule:
    """``mod`` for all these batches, heads, queries and keys, as plain ops on its operands."""

    def run(*operands: Any) -> Any:
        return at(mod, every, device, operands, has_score)

    return as_plain_ops(run, operands)


def at(
    mod: fx.GraphModule,
    every: Sequence[range],
    device: torch.device,
    operands: Sequence[Any],
    has_score: bool = False,
) -> Tensor:
    """``mod(score, b, h, i, j, *buffers)`` at these batches, heads, queries and keys. Operands are
    the scores, if it has any, and the buffers."""
    before, behind = operands[:has_score], operands[has_score:]
    each = flex_vmap(mod, prefix=(0,) * len(before), suffix=(None,) * len(behind))
    positions = (torch.arange(x.start, x.stop, device=device) for x in every)
    with ByIndex():
        found: Tensor = each(*before, *positions, *behind)
        return found


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
