"""Tensors of many lengths: what Dynamo sees of one while a unit is called for a whole bucket.

x: ShardedTensor f64[2, 37, 8], cut as 37=0:16|16:37
in x.in_bucket((place,)) Dynamo sees f64[2, s0, 8], cut as 64=0:16,48:64|16:48, and no part
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mosaic.layout import Place


@dataclass(frozen=True)
class Bucketed:
    """What Dynamo guards of a tensor that is cut: its places at the longest length."""

    places: tuple[Place, ...]


class ManyLengths(Tensor):
    """``bucket``: what stands for the length in its guards."""

    bucket: Any = None
    #: What Dynamo sees of a part whose length changes: its dtype and device.
    _nothing: Tensor

    def _is_view(self) -> bool:
        """Of many lengths it is none: Dynamo would look at what it is a view of, at one length."""
        return self.bucket is None and super()._is_view()

    @contextmanager
    def in_bucket(self, bucket: Any) -> Iterator[None]:
        self.bucket = bucket
        try:
            yield
        finally:
            self.bucket = None


def is_open(x: Any) -> bool:
    """Whether it is one of many lengths now."""
    return isinstance(x, ManyLengths) and x.bucket is not None


def of_length(x: Any, n: int) -> Any:
    """A fake tensor that is cut, and one of many lengths, with this one (a symbol)."""
    (place,) = x.bucket
    shape = [n if d == place.dim else size for d, size in enumerate(x.shape)]
    found = type(x)(x._nothing, shape, x.bucket, strides_in(x.stride(), shape))
    found.bucket, found._nothing = x.bucket, x._nothing
    return found


def strides_in(like: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor with its dims in the order of these strides."""
    found, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=like.__getitem__):
        found[dim], step = step, step * shape[dim]
    return tuple(found)
