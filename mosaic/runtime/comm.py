"""Programs that move a sharded axis: plain aten and functional collectives, nothing differentiable.

An op's eager implementation runs its program, and the lowering traces the same one into the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.layout import (
    Comb,
    Interval,
    Layout,
    Place,
    Run,
    Shard,
    combs,
    exchange,
    joined_runs,
)
from mosaic.layout.windows import returned
from mosaic.runtime.mesh import current_context

#: What carries a dtype that NCCL or gloo cannot move or reduce; every value fits.
CARRIERS = {torch.bool: torch.uint8, torch.int16: torch.int32}


def carried(x: Tensor) -> Tensor:
    """As what NCCL and gloo can move: of complex numbers pairs, as a last dim; on the GPU where
    NCCL connects the ranks (a ``torch.randperm(n)`` is on the CPU)."""
    context = current_context()
    if context is not None and context.device.type == "cuda":
        x = x.to(context.device)
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj()).contiguous()
    return x.to(CARRIERS.get(x.dtype, x.dtype)).contiguous()


def restored(x: Tensor, like: Tensor) -> Tensor:
    """Undo ``carried``."""
    x = torch.view_as_complex(x) if like.is_complex() else x.to(like.dtype)
    return x.to(like.device)


def wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor.default(x)


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """The sum (or max, min) over the ranks. The sum of bools is whether any is true."""
    if not group:
        return x
    reduce_op = "max" if (x.dtype, op) == (torch.bool, "sum") else op
    total = torch.ops._c10d_functional.all_reduce.default(carried(x), reduce_op, group)
    return restored(wait(total), x)


def reduced(x: Tensor, group: str, op: str) -> Tensor:
    """``all_reduce``; a max or min is nan where any rank's is, which gloo and NCCL may lose."""
    if op == "sum" or not x.is_floating_point():
        return all_reduce(x, group, op)
    sign = 1 if op == "max" else -1
    numbers = torch.where(x.isnan(), -sign * math.inf, x)
    both = torch.stack([numbers, sign * x.isnan().to(x.dtype)])
    best, nans = all_reduce(both, group, op).unbind(0)
    return torch.where(nans == 0, best, math.nan)


def broadcast(x: Tensor, group: str) -> Tensor:
    """Rank 0's values on every rank; they have no gradient."""
    if not group:
        return x
    sent = torch.ops._c10d_functional.broadcast.default(carried(x.detach()), 0, group)
    return restored(wait(sent), x)


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """Start (do not wait for) an exchange along dim 0; one split per peer."""
    return torch.ops._c10d_functional.all_to_all_single.default(x, list(receive), list(send), group)


def all_gather(x: Tensor, p: int, group: str) -> Tensor:
    """Start (do not wait for) joining equal parts along dim 0."""
    return torch.ops._c10d_functional.all_gather_into_tensor.default(x.contiguous(), p, group)


# --- pieces of an axis ----------------------------------------------------------------------


#: So many evenly spaced stretches are taken as one view, so that programs for 1,024 ranks are as
#: long as those for 8. Fewer are slices, which are easier to read.
MANY = 8


def take_runs(x: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """Join stretches of ``x`` along ``dim``; no copy where they are one stretch."""
    parts = [
        combed(x, run, dim) if isinstance(run, Comb) else x.narrow(dim, run.start, run.length)
        for run in combs(runs, MANY)
    ]
    return joined(parts, dim) if parts else x.narrow(dim, 0, 0)


def combed(x: Tensor, comb: Comb, dim: int) -> Tensor:
    """The stretches of a comb, joined along ``dim``."""
    found = []
    for start, length, spacing in comb.teeth:
        reach = (comb.repeats - 1) * abs(spacing)
        low = start if spacing > 0 else start - reach
        tooth = x.narrow(dim, low, reach + length).unfold(dim, length, abs(spacing))
        tooth = tooth.movedim(-1, dim + 1)
        found.append(tooth.flip(dim) if spacing < 0 else tooth)
    return joined(found, dim + 1).flatten(dim, dim + 1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def padded(rows: Tensor, length: int) -> Tensor:
    """Zeros behind dim 0, up to ``length``."""
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows, rows.new_zeros([length - rows.shape[0], *rows.shape[1:]])])


def _unfolded(x: Tensor, place: Place, count: int) -> Tensor:
    """Dim ``place.dim`` of size outer x count x inner as three dims."""
    shape = [*x.shape[: place.dim], place.outer, count, place.inner, *x.shape[place.dim + 1 :]]
    return x.reshape(shape)


def _folded(x: Tensor, place: Place) -> Tensor:
    """Undo ``_unfolded``."""
    start, size = place.dim, math.prod(x.shape[place.dim : place.dim + 3])
    return x.reshape([*x.shape[:start], size, *x.shape[start + 3 :]])


def _axis_first(x: Tensor, place: Place, count: int) -> Tensor:
    """(count, everything else): collectives work along dim 0."""
    return _unfolded(x, place, count).movedim(place.dim + 1, 0).contiguous()


def _axis_back(x: Tensor, place: Place) -> Tensor:
    return _folded(x.movedim(0, place.dim + 1), place)


def local_slice(x: Tensor, shard: Shard) -> Tensor:
    """My intervals of a whole tensor; nothing is communicated."""
    place = shard.place
    runs = [Run(*interval) for interval in place.layout.ranks[shard.rank]]
    if place.outer == place.inner == 1:
        return take_runs(x, runs, place.dim)
    return _folded(take_runs(_unfolded(x, place, place.layout.n), runs, place.dim + 1), place)


def spread(x: Tensor, shard: Shard) -> Tensor:
    """The transpose of ``local_slice``: my intervals added into a whole of zeros."""
    place, n, dim = shard.place, shard.place.layout.n, shard.place.dim + 1
    local = _unfolded(x, place, place.layout.lengths[shard.rank])
    whole = local.new_zeros([n if d == dim else size for d, size in enumerate(local.shape)])
    offset, behind = 0, local.dim() - 1 - dim
    for start, stop in place.layout.ranks[shard.rank]:
        piece = local.narrow(dim, offset, stop - start)
        whole = whole + torch.constant_pad_nd(piece, [0, 0] * behind + [start, n - stop])
        offset += stop - start
    return _folded(whole, place)


def _partition(shard: Shard) -> Layout:
    if not shard.place.layout.is_partition:
        raise ShardingError(
            "only a partition of an axis can be moved",
            layout=shard.place.layout,
            fix="cut it with Layout.even or Layout.zigzag: every index belongs to one rank",
        )
    return shard.place.layout


# --- programs: aten and functional collectives only -------------------------------------------


def gather_program(x: Tensor, shard: Shard) -> Tensor:
    """Sharded -> whole, by one padded all-gather."""
    layout, place = _partition(shard), shard.place
    if layout.ranks == ((Interval(0, layout.n),),):
        return x.contiguous()
    longest = max(layout.lengths)
    rows = padded(_axis_first(x, place, layout.lengths[shard.rank]), longest)
    if layout.p > 1:
        rows = restored(wait(all_gather(carried(rows), layout.p, shard.group)), x)
    runs = [Run(r * longest + a, r * longest + b) for r, (a, b, _) in layout.gather_order()]
    return _axis_back(take_runs(rows, joined_runs(runs), 0), place).contiguous()


def reshard_program(x: Tensor, source: Shard, target: Shard) -> Tensor:
    """One partition to another, by one all-to-all with static splits (none where nothing moves)."""
    old, new = _partition(source), _partition(target)
    if old == new:
        return x.contiguous()
    return exchanged(x, source, target, old, new)


def exchanged(x: Tensor, source: Shard, target: Shard, old: Layout, new: Layout) -> Tensor:
    rank = source.rank
    mine = exchange(old, new, rank)
    sent = take_runs(_axis_first(x, source.place, old.lengths[rank]), mine.take, 0)
    if not new.is_within(old):
        moved = wait(all_to_all(carried(sent), mine.receive, mine.send, source.group))
        sent = restored(moved, x)
    return _axis_back(take_runs(sent, mine.place, 0), target.place).contiguous()


def halo_program(x: Tensor, source: Shard, target: Shard) -> Tensor:
    """A partition to a layout that overlaps: everybody gets what it needs of the others."""
    return exchanged(x, source, target, _partition(source), target.place.layout)


def halo_sum_program(x: Tensor, source: Shard, target: Shard) -> Tensor:
    """The adjoint of ``halo_program(source, target)``: what was lent comes back and is added."""
    old, new, rank = _partition(source), target.place.layout, source.rank
    mine = returned(old, new, rank)
    sent = take_runs(_axis_first(x, target.place, new.lengths[rank]), mine.take, 0)
    if not new.is_within(old):
        moved = wait(all_to_all(carried(sent), mine.receive, mine.send, source.group))
        sent = restored(moved, x)
    parts = [added(sent, stretch, at) for stretch, at in mine.add]
    total = joined(parts, 0) if parts else sent.narrow(0, 0, 0)
    return _axis_back(total, source.place).contiguous()


def added(received: Tensor, stretch: Run, offsets: Sequence[int]) -> Tensor:
    """The sum of what came back for one stretch of memory."""
    length = stretch.stop - stretch.start
    terms = [received.narrow(0, at, length) for at in offsets]
    return sum(terms[1:], terms[0]) if terms else received.new_zeros([length, *received.shape[1:]])


def fresh(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An op's results may share memory neither with its inputs nor with each other: copy those."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
    out = []
    for x in outputs:
        x = x.clone() if x.untyped_storage().data_ptr() in taken else x
        taken.add(x.untyped_storage().data_ptr())
        out.append(x)
    return tuple(out)
