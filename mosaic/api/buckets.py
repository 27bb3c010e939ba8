"""Which lengths share one compiled program: those of a bucket, each padded to its longest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mosaic.api.errors import ShardingError

Buckets = Literal["powers"] | Sequence[int]


class Bucket(NamedTuple):
    """The lengths low < n <= high."""

    low: int
    high: int


def bucket_of(buckets: Buckets, n: int) -> Bucket | None:
    """The bucket of a length; None for one that is longer than all.

    >>> bucket_of("powers", 37), bucket_of((48, 96), 48), bucket_of((48, 96), 97)
    (Bucket(low=32, high=64), Bucket(low=0, high=48), None)
    """
    if buckets == "powers":
        high = 1 << (n - 1).bit_length()
        return Bucket(high // 2, high)
    lengths = sorted(map(int, buckets))
    at = bisect_left(lengths, n)
    return None if at == len(lengths) else Bucket(lengths[at - 1] if at else 0, lengths[at])


def check_buckets(buckets: object, axes: int) -> None:
    """Raise ShardingError unless they are a rule or lengths, for one axis that is cut."""
    if buckets is None:
        return
    is_rule = isinstance(buckets, str) and buckets == "powers"
    is_lengths = isinstance(buckets, (list, tuple)) and bool(buckets)
    numbers = buckets if is_lengths and isinstance(buckets, (list, tuple)) else ()
    if not is_rule and (not numbers or not all(type(n) is int and n > 1 for n in numbers)):
        raise ShardingError(
            f"buckets = {buckets!r} are no lengths",
            fix='give the lengths to pad to, as in (1024, 2048, 4096), or "powers" (of two)',
        )
    if axes != 1:
        raise ShardingError(
            f"buckets are lengths of one axis, and {axes or 'none'} with a name is cut",
            fix="name the axis that is cut: inputs={'ids': 'batch tokens'}, "
            "axes={'tokens': 'auto'}",
        )
