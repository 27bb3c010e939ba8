"""One attention over several ranks: the program that every method is, in aten ops and collectives.

Queries are gathered over a few ranks (most methods: none but its own), keys visit in portions, each
starting to travel before the last is attended to, and partial outputs go home to be merged. Nothing
is kept for backward but q, k, v, out and lse: what visited visits again, and the gradients go back
the way it came. Sources: Liu et al., "Ring Attention", 2023; "Mesh-Attention", arXiv 2512.20968.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, zip_longest

import torch
from torch import Tensor

from mosaic.attention.attend import attend, attend_backward
from mosaic.attention.mask_gradients import mask_gradients
from mosaic.attention.merge import Partial, accumulator, finite, merge, merge_stacked, nothing
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.route import Route, Stop, route_of
from mosaic.attention.shift import shift_of
from mosaic.attention.transfer import Returned, Tensors, Transfer, summed
from mosaic.attention.visit import Inputs, is_in_kernel, key_blocks, visit
from mosaic.layout import Intervals, Run
from mosaic.runtime.comm import all_reduce, joined, take_runs


def visits(route: Route, own: Tensors) -> Iterator[tuple[Stop, Tensors]]:
    """Keys and values as they come. The next are on their way while these are attended to."""
    windows = [list(stops) for _, stops in groupby(route.stops, lambda stop: stop.window)]
    packed: dict[Intervals, Tensor] = {}
    coming = windows[0][0].window.start(own, packed) if windows else None
    for number, stops in enumerate(windows):
        held = stops[0].window.finish(coming, own)
        if number + 1 < len(windows):
            coming = windows[number + 1][0].window.start(own, packed)
        in_window = packed if held is own else {}
        next_step = stops[0].step.start(held, in_window)
        for stop, following in zip_longest(stops, stops[1:]):
            here = stop.step.finish(next_step, held)
            next_step = following.step.start(held, in_window) if following else None
            yield stop, here


def portions(
    stop: Stop, q: Tensor, held: Tensors, plan: AttentionPlan
) -> Iterator[tuple[Intervals, Tensors]]:
    """A stop's keys and values, as many as are attended to at once."""
    has_tiles = bool(plan.tile) and not is_in_kernel(plan, q, *held)
    blocks = key_blocks(plan, stop.keys, has_tiles)
    for run, keys in blocks:
        yield keys, held if len(blocks) == 1 else tuple(take_runs(x, [run], 2) for x in held)


def forward(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, plan: AttentionPlan) -> Partial:
    """out (batch, heads, seq, v_dim) and lse (batch, heads, seq) of this rank's queries."""
    route = route_of(plan)
    (rows,) = route.queries.finish(route.queries.start((q,)), (q,))
    shift = shift_of(plan, route.rows, rows, (k, v), inputs)
    found: Partial | None = None
    for stop, held in visits(route, (k, v)):
        for at, (keys, values) in portions(stop, rows, held, plan):
            here = visit(plan, route.rows, at, rows, inputs, shift)
            found = attend(rows, keys, values, here, found)
    found = found or nothing(rows, v)
    return everywhere(found, plan) if plan.strategy.everywhere else home(found, q, route)


def home(found: Partial, q: Tensor, route: Route) -> Partial:
    """Partial outputs return to the ranks whose queries they are, and are merged there."""
    if route.queries.is_identity:
        return found
    out, lse = (found[0].to(q.dtype),), (found[1].unsqueeze(-1),)
    crossing = route.queries
    pending = [crossing.start_back(sent) for sent in (out, lse)]
    outs, lses = (crossing.finish_back(x, y) for x, y in zip(pending, (out, lse), strict=True))
    return merge([together(o, x) for o, x in zip(outs, lses, strict=True)])


def together(out: Returned, lse: Returned) -> Partial:
    """One partial attention of those that several ranks sent."""
    if out.ranks == 1:
        return out.parts[0], lse.parts[0].squeeze(-1)
    return merge_stacked(out.stacked()[0], lse.stacked()[0].squeeze(-1))


def everywhere(found: Partial, plan: AttentionPlan) -> Partial:
    """Merge partial attentions of the same queries over all ranks; whole on each (split-KV)."""
    out, lse = found
    if plan.p == 1:
        return found
    largest = finite(all_reduce(lse, plan.group, "max"))
    weight = torch.exp(lse - largest).unsqueeze(-1)
    total = all_reduce(torch.cat([out * weight, weight], -1), plan.group)
    out, weight = total.split([out.shape[-1], 1], -1)
    divisor = torch.where(weight == 0, torch.ones_like(weight), weight)
    return out / divisor, largest + torch.log(weight.squeeze(-1))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """dq, dk, dv of this rank; and the gradients of its mask rows and of leaves."""
    route = route_of(plan)
    douts, rows, outs, lses = gathered((dout, q, out, lse), route)
    returns = Returns((k, v), plan.strategy.grad_dtype)
    dq = torch.zeros_like(rows, dtype=accumulator(q.dtype))
    shift = shift_of(plan, route.rows, rows, (k, v), inputs)
    gradients = mask_gradients(plan, route.rows, inputs) if need_dmask else None
    for stop, held in visits(route, (k, v)):
        dkvs = []
        for at, (keys, values) in portions(stop, rows, held, plan):
            here = visit(plan, route.rows, at, rows, inputs, shift)
            grads = attend_backward(douts, rows, keys, values, outs, lses, here, need_dmask)
            dq = dq + grads.q
            dkvs.append((grads.k, grads.v))
            if gradients:
                gradients.add(at, grads.mask, grads.leaves)
        returns.send(stop, tuple(joined(grads, 2) for grads in zip(*dkvs, strict=True)))
    dk, dv = returns.total()
    dq = all_reduce(dq, plan.group) if plan.strategy.everywhere else home_gradient(dq, q, route)
    return dq, dk, dv, gradients.total() if gradients else []


def gathered(mine: Tensors, route: Route) -> Tensors:
    """dout, q, out and lse of all rows that are attended here.

    One after the other, as NCCL has it anyway: two ``all_gather_into_tensor`` in flight corrupt the
    heap of a process that uses gloo (torch 2.11 to 2.13; without Mosaic, too, within some 20,000
    rounds; other pairs of collectives do not).
    """
    if route.queries.is_identity:
        return mine
    dout, q, out, lse = mine
    sent, sizes = (dout.to(q.dtype), q, out.to(q.dtype)), (lse.unsqueeze(-1),)
    rows = route.queries.finish(route.queries.start(sent), sent)
    (lses,) = route.queries.finish(route.queries.start(sizes), sizes)
    return (*rows, lses.squeeze(-1))


def home_gradient(dq: Tensor, q: Tensor, route: Route) -> Tensor:
    sent = (dq.to(q.dtype),)
    back = route.queries.finish_back(route.queries.start_back(sent), (dq,))
    (total,) = summed(back, q.shape[2], (dq,))
    return total


class Returns:
    """dK and dV on their way home: each visit's go back to whoever sent the keys, while the next
    visit is at work, and are added up there in float32 (float64 for float64)."""

    def __init__(self, own: Tensors, grad_dtype: str):
        self.own = own
        self.dtype = getattr(torch, grad_dtype) if grad_dtype else own[0].dtype
        self.window: list[Returned] = []  # what came home within the window
        self.found: list[Returned] = []  # and from the windows before
        self.pending: tuple[Transfer, Tensor | None, Tensors, list[Returned]] | None = None

    def send(self, stop: Stop, grads: Tensors) -> None:
        self._go(stop.step, grads, self.window)
        if stop.is_last:
            self._arrive()
            held = stop.window.after.lengths[stop.window.side.rank]
            total = summed(self.window, held, grads)
            self.window = []
            self._go(stop.window, total, self.found)

    def total(self) -> Tensors:
        self._arrive()
        zeros = tuple(x.new_empty(x.shape, dtype=accumulator(x.dtype)) for x in self.own)
        return summed(self.found, self.own[0].shape[2], zeros)

    def _go(self, crossing: Transfer, grads: Tensors, to: list[Returned]) -> None:
        sent = grads if crossing.is_identity else tuple(x.to(self.dtype) for x in grads)
        started = crossing.start_back(sent)
        self._arrive()
        self.pending = (crossing, started, grads, to)

    def _arrive(self) -> None:
        if self.pending is None:
            return
        crossing, started, grads, to = self.pending
        length = crossing.before.lengths[crossing.side.rank]
        came = crossing.finish_back(started, grads)
        # Added up as they come: a list of all of them would be as long as the axis.
        to[:] = [Returned((Run(0, length),), summed([*to, *came], length, grads))]
        self.pending = None
