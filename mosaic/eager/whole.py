"""``mosaic.attention`` on ShardedTensors: they are of the whole program, and know how they are cut.

A compiled function sees tensors of global sizes, cut or not. So in one that is given a
ShardedTensor every attention is of the whole program; elsewhere plain tensors are shards.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.attention.visit import Inputs
from mosaic.eager.operands import band_of, check_inputs, check_tensors, four_dims
from mosaic.layout import Layout
from mosaic.runtime.sharded_tensor import RUN, ShardedTensor
from mosaic.torch_private import inputs_that_dynamo_has


def are_of_wholes(*tensors: Any) -> bool:
    """Whether these stand for the tensors of the whole program, and not for this rank's shards."""
    if any(isinstance(x, ShardedTensor) for x in tensors):
        return True
    return any(isinstance(x, ShardedTensor) for x in inputs_that_dynamo_has())


def refuse_whole(x: Tensor, fix: str) -> None:
    """Raise ShardingError for a ShardedTensor where a shard is wanted."""
    if are_of_wholes(x):
        raise ShardingError("a ShardedTensor is of the whole program, and no shard", fix=fix)


def attention_of_wholes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    method: str,
    bounds: tuple[bool, int | None, int | None],
    scale: float | None,
    dropout: float,
    layouts: str,
) -> Tensor:
    """``mosaic.attention`` of the whole program: a mask has all rows, and it and documents may be
    cut; ``method`` is for an attended axis that is cut. Raises ShardingError for layouts beside
    those that the tensors have."""
    if layouts:
        raise ShardingError(
            "a layout is given, and a ShardedTensor has its own",
            layout=layouts,
            fix="leave it out, or pass parts: x.local",
        )
    check_tensors(q, k, v)
    inputs = four_dims(inputs)
    check_inputs(q, inputs, Layout.even(q.shape[2], 1), Layout.even(k.shape[2], 1))
    mask, queries, keys, *_ = inputs
    out: Tensor = RUN["structured"](
        q, k, v, mask, dropout, False,
        scale=scale, enable_gqa=q.shape[1] != k.shape[1], **band_of(*bounds)._asdict(),
        query_documents=queries, key_documents=keys, method=method,
    )  # fmt: skip
    return out
