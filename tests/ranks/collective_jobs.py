"""What ranks do in tests of the adjoint pairs: the errors against one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from attention_jobs import lowering_backend
from torch import Tensor

import mosaic.runtime.collectives as c
from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.comm import broadcast

F64 = torch.float64


def layouts(n: int, p: int) -> list[Layout]:
    """Even, zigzag, uneven with two intervals in reverse, and with nothing on some rank."""
    backwards = Layout(n, tuple(reversed(Layout.zigzag(n, p).ranks)))
    lonely = Layout.of(n, [[(0, n)] if r == p - 1 else [] for r in range(p)])
    swapped = Layout.of(n, [[(n - 1, n), (0, n - 1)] if r == 0 else [] for r in range(p)])
    return [Layout.even(n, p), Layout.zigzag(n, p), backwards, lonely, swapped]


def shards(n: int, outer: int, inner: int) -> list[Shard]:
    p, rank = dist.get_world_size(), dist.get_rank()
    name = dist.group.WORLD.group_name if p > 1 else ""
    return [Shard(Place(layout, 1, outer, inner), rank, name) for layout in layouts(n, p)]


def part(x: Tensor, shard: Shard) -> Tensor:
    """My elements of dim 1, by their indices."""
    place = shard.place
    blocks = x.unflatten(1, (place.outer, place.layout.n, place.inner))
    return blocks[:, :, place.layout.indices(shard.rank)].flatten(1, 3).clone()


def difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def pair(
    fn: Callable[[Tensor], Tensor], x: Tensor, want: Tensor, dout: Tensor, dwant: Tensor
) -> float:
    x = x.clone().requires_grad_()
    out = fn(x)
    (grad,) = torch.autograd.grad(out, x, dout)
    return max(difference(out.detach(), want), difference(grad, dwant))


def adjoint_pairs() -> dict[str, float]:
    errors = {}
    for n, (outer, inner) in itertools.product((13, 2), ((1, 1), (2, 3))):
        torch.manual_seed(n)
        whole, dwhole = torch.randn(2, 2, outer * n * inner, 3, dtype=F64).unbind(0)
        found = shards(n, outer, inner)
        for i, shard in enumerate(found):
            spec, mine, dmine = shard.encode(), part(whole, shard), part(dwhole, shard)
            name = f"{shard.place}"
            gather, slice_to = (
                partial(torch.ops.mosaic.gather, spec=spec),
                partial(c.slice_to, spec=spec),
            )
            gathered = pair(gather, mine, whole, dwhole, dmine)
            sliced = pair(slice_to, whole, mine, dmine, dwhole)
            errors |= {f"gather {i} {name}": gathered, f"slice {i} {name}": sliced}
            for j, other in enumerate(found):
                move = partial(torch.ops.mosaic.reshard, source=spec, target=other.encode())
                moved = pair(move, mine, part(whole, other), part(dwhole, other), dmine)
                errors[f"reshard {i} {j} {name}"] = moved
    return errors


def sums() -> dict[str, float]:
    """``enter`` and ``sum_across``: every rank weighs by its own number."""
    p, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD.group_name if p > 1 else ""
    x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    total = sum(r + 1 for r in range(p))
    entered = pair(lambda x: c.enter(x, group) * (rank + 1), x, x * (rank + 1), x, x * total)
    summed = pair(lambda x: c.sum_across(x * (rank + 1), group), x, x * total, x, x * (rank + 1))
    largest = difference(c.sum_across(x * (rank + 1), group, "max"), torch.maximum(x, x * p))
    flag = torch.tensor([rank == 0, False])
    some = difference(c.sum_across(flag, group), torch.tensor([True, False]))
    first = difference(broadcast(x * (rank + 1), group), x)
    return {
        "enter": entered,
        "sum_across": summed,
        "max": largest,
        "bool": some,
        "broadcast": first,
    }


def overlapping_slices() -> dict[str, float]:
    """Intervals that overlap (a halo) and leave indices out: gradients add up."""
    p, rank = dist.get_world_size(), dist.get_rank()
    layout = Layout.of(10, [[(max(0, 2 * r - 1), 2 * r + 2)] for r in range(p)])
    group = dist.group.WORLD.group_name if p > 1 else ""
    errors = {}
    for outer, inner in ((1, 1), (2, 3)):
        shard = Shard(Place(layout, 1, outer, inner), rank, group)
        x = torch.randn(2, shard.place.size, generator=torch.Generator().manual_seed(0)).to(F64)
        count = torch.zeros(10, dtype=F64)
        for r in range(p):
            count[layout.indices(r)] += r + 1
        want = count.repeat_interleave(inner).repeat(outer).expand(2, -1)
        mine = part(x, shard)
        dout = torch.full_like(mine, rank + 1)
        got = pair(partial(c.slice_to, spec=shard.encode()), x, mine, dout, want)
        errors[f"halo {outer} {inner}"] = got
    return errors


def dtypes() -> dict[str, float]:
    """Everything a program may hold moves: masks, ids, half precision."""
    errors = {}
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16):
        whole = torch.arange(2 * 13 * 3).reshape(2, 13, 3).remainder(3).to(dtype)
        source, target, *_ = shards(13, 1, 1)
        moved = torch.ops.mosaic.reshard(part(whole, source), source.encode(), target.encode())
        gathered = torch.ops.mosaic.gather(part(whole, source), source.encode())
        errors[f"{dtype}"] = max(
            difference(moved, part(whole, target)), difference(gathered, whole)
        )
    return errors


def layer(x: Tensor, w: Tensor, b: Tensor, source: str, target: str, group: str) -> Tensor:
    """Two parameters, a gather, a reshard and a sum: what a partitioned program looks like."""
    x = torch.tanh(x @ c.enter(w, group) + c.enter(b, group))
    moved = torch.ops.mosaic.reshard(x, source, target)
    whole = torch.ops.mosaic.gather(x, source)
    return c.slice_to(whole.cumsum(1), target) * moved + c.sum_across(moved.sum(), group)


def lowered(inner: str) -> tuple[dict[str, float], dict[str, list[str]]]:
    """``layer`` compiled and lowered, against eager: errors beside the largest number, and the ops
    of each graph."""
    source, target, *_ = shards(13, 1, 1)
    torch.manual_seed(0)
    whole, w, b = (
        torch.randn(2, 13, 3, dtype=F64),
        torch.randn(3, 3, dtype=F64),
        torch.randn(3, dtype=F64),
    )
    specs = (source.encode(), target.encode(), source.group)
    backend, seen = lowering_backend(inner)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for fn in (layer, compiled):
        leaves = [x.clone().requires_grad_() for x in (part(whole, source), w, b)]
        out = fn(*leaves, *specs)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    errors = {
        str(i): difference(want, got) / max(1.0, want.abs().max().item())
        for i, (want, got) in enumerate(zip(*results, strict=True))
    }
    seen.pop("saved")
    return errors, seen


def everything() -> dict[str, float]:
    return adjoint_pairs() | sums() | overlapping_slices() | dtypes()
