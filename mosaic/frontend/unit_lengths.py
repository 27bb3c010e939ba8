"""A unit's arguments at any length of a bucket: what Dynamo guards of them is the same for all.

    x: ShardedTensor f64[2, 37, 8]      cut as 37=0:16|16:37 over 2 ranks
    Dynamo sees      f64[2, s0, 8]      cut as 64=0:16,48:64|16:48, of which these are the first 37

Outside of the unit every tensor has its own length, and so has what the unit gives: no op between
units meets padding. Inside, the program is that of the bucket (``lengths.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.api.buckets import Buckets, bucket_of
from mosaic.frontend.sharded_inputs import Arriving, placeholder_values
from mosaic.layout import Layout, Place
from mosaic.runtime.collectives import gather
from mosaic.runtime.comm import take_runs
from mosaic.runtime.deferred_tensor import DeferredTensor, SizeOf, Step, flattened
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, shard_on
from mosaic.torch_private import mark_changing, pytree

aten = torch.ops.aten
#: How the inputs of a model are cut, and what its blocks give.
KINDS: tuple[Callable[[int, int], Layout], ...] = (Layout.zigzag, Layout.even, Layout.zigzags)
#: The arguments of these that may be sizes, by number.
SIZES = {
    aten.arange.start_step: (1,),
    **dict.fromkeys((aten.expand.default, aten.view.default, aten.reshape.default), (1,)),
}


def layout_of(
    n: int, p: int, kind: Callable[[int, int], Layout], buckets: Buckets | None
) -> Layout:
    """How n rows are cut: with buckets as the first of the bucket's."""
    bucket = bucket_of(buckets, n) if buckets is not None else None
    return kind(n, p) if bucket is None else kind(bucket.high, p).slice(0, n)


@contextmanager
def in_bucket(buckets: Buckets | None, arguments: Any, now: int) -> Iterator[None]:
    """While a unit is called: Dynamo sees its tensors as those of many lengths. ``now``: the length
    of the model's inputs, for units that are given nothing cut."""
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    pairs = [(leaf, x.shape) for x in tensors for leaf in flattened([x])]
    cut = [(leaf, sizes) for leaf, sizes in pairs if isinstance(leaf, ShardedTensor)]
    places = [(x, at_bucket(x, sizes, buckets)) for x, sizes in cut] if buckets is not None else []
    longer = [(x, place) for x, place in places if place is not None]
    n = max((x.places[0].layout.n for x, _ in longer), default=0 if cut else now)
    with ExitStack() as stack:
        for x, place in longer:
            if x.places[0].layout.n == n:
                x._nothing = x._local.new_empty(())
                stack.enter_context(x.in_bucket((place,)))
                mark_changing(x, place.dim)
        for tensor in dict.fromkeys((*tensors, *(leaf for leaf, _ in pairs))) if n else ():
            open_sizes(tensor, n, stack)
        yield


def at_bucket(x: ShardedTensor, sizes: Sequence[int], buckets: Buckets) -> Place | None:
    """Where the rows of a tensor would be at the bucket's length; None if it is cut otherwise, and
    if ``sizes``, which Dynamo guards, say nothing of the length."""
    if len(x.places) != 1:
        return None
    (place,) = x.places
    n, p = place.layout.n, place.layout.p
    bucket = bucket_of(buckets, n) if n > 1 and n in sizes else None
    is_row = (place.outer, place.inner) == (1, 1)
    every = (kind(bucket.high, p) for kind in KINDS) if bucket and is_row else ()
    found = next((base for base in every if base.slice(0, n) == place.layout), None)
    return None if found is None else place.with_layout(found)


def open_sizes(x: Tensor, n: int, stack: ExitStack) -> None:
    """Let Dynamo leave the sizes open that are the length, also those in a deferred program."""
    dims = [d for d, size in enumerate(x.shape) if size == n]
    is_learned = isinstance(x, DeferredTensor) and x.requires_grad
    if not dims or is_learned or isinstance(x, ShardedTensor):
        return
    if isinstance(x, DeferredTensor):
        steps = tuple(opened(step, n, SizeOf(dims[0])) for step in x.steps)
        stack.enter_context(x.in_bucket((steps, dims[0])))
    for dim in dims:
        mark_changing(x, dim)


def at_their_length(module: fx.GraphModule, arriving: Arriving) -> Arriving:
    """Where inputs are cut, if they are not taken for a bucket's after all. Dynamo then guards the
    length."""
    found = dict(arriving)
    for i, x in enumerate(flattened(placeholder_values(module))):
        if isinstance(x, ShardedTensor) and x.bucket is not None:
            (place,) = x.bucket
            found[i] = (place.with_layout(place.layout.slice(0, int(x.shape[place.dim]))),)
    return found


def opened(step: Step, n: int, size: SizeOf) -> Step:
    """A step with the length left open, where it stands for a size."""

    def follow(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(follow, x))
        return size if x == n and type(x) is int else x

    args = [follow(x) if i in SIZES.get(step.op, ()) else x for i, x in enumerate(step.args)]
    return Step(step.op, tuple(args), step.kwargs)


# --- a run --------------------------------------------------------------------------------------


def lengthened_part(x: ShardedTensor) -> Tensor:
    """This rank's part at the bucket's length: copies of its last row stand for padding; of the
    first of all where it has none."""
    assert x.bucket is not None
    (place,), (longer,) = x.places, x.bucket
    part, rank, n = x.local, get_context().rank(place.mesh_axis), place.layout.n
    if n == longer.layout.n:
        return part.contiguous()
    first = part if all(place.layout.lengths) else first_row(x, place)
    pieces, at = [], 0
    for start, stop in longer.layout.ranks[rank]:
        real = max(0, min(stop, n) - start)
        padding = stop - start - real
        at += real
        pieces.append(part.narrow(place.dim, at - real, real))
        if padding:
            row = part.detach().narrow(place.dim, at - 1, 1) if at else first
            pieces.append(row.repeat_interleave(padding, place.dim))
    return torch.cat(pieces, place.dim) if len(pieces) > 1 else pieces[0].contiguous()


def first_row(x: ShardedTensor, place: Place) -> Tensor:
    """The axis' first row, on every rank."""
    rank, alone = get_context().rank(place.mesh_axis), place.with_layout(place.layout.slice(0, 1))
    part = take_runs(x.local.detach(), place.layout.runs(rank, 0, 1), place.dim)
    return gather(part.contiguous(), shard_on(alone))
