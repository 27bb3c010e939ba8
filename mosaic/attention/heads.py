"""Sequence for heads and back: the all-to-all of Ulysses, as a registered op.

A group of u ranks holds a sequence in u parts with all heads; afterwards each of them holds 1/u of
the heads with the whole sequence, in global order. KV heads that are fewer than u go to several
ranks, and their gradients are added up on the way back (Jacobs et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from itertools import chain
from math import prod

import torch
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.layout import Interval, Layout, Run
from mosaic.runtime.comm import all_to_all, fresh, take_runs, wait


@dataclass(frozen=True)
class HeadExchange:
    """One rank's side. ``layouts``: for each tensor who of the group holds which positions;
    ``heads``: how many it has. ``slot`` is this rank's number in the group."""

    slot: int
    peers: tuple[int, ...]
    world: int
    group: str
    layouts: tuple[Layout, ...]
    heads: tuple[int, ...]

    def encode(self) -> str:
        return json.dumps({**asdict(self), "layouts": [str(layout) for layout in self.layouts]})

    @classmethod
    def decode(cls, text: str) -> HeadExchange:
        fields = json.loads(text)
        fields["layouts"] = tuple(Layout.parse(layout) for layout in fields["layouts"])
        return cls(**{**fields, "peers": tuple(fields["peers"]), "heads": tuple(fields["heads"])})

    @property
    def u(self) -> int:
        return len(self.peers)

    def heads_of(self, slot: int, heads: int) -> range:
        """The heads that a slot holds afterwards."""
        if heads % self.u:
            return range(slot * heads // self.u, slot * heads // self.u + 1)
        return range(slot * heads // self.u, (slot + 1) * heads // self.u)

    def part(self, x: Tensor, number: int, slot: int, to_heads: bool) -> Tensor:
        """What a slot gets of this rank's tensor: its heads, or its positions."""
        if to_heads:
            heads = self.heads_of(slot, self.heads[number])
            return x[:, heads.start : heads.stop]
        return take_runs(x, [Run(*i) for i in self.layouts[number].ranks[slot]], 2)

    def block(self, x: Tensor, number: int, slot: int, to_heads: bool) -> list[int]:
        """The shape of what this rank gets from a slot: its heads of the slot's positions, or the
        slot's heads of its positions."""
        holder, owner = (self.slot, slot) if to_heads else (slot, self.slot)
        heads = len(self.heads_of(holder, self.heads[number]))
        return [x.shape[0], heads, self.layouts[number].lengths[owner], x.shape[3]]

    def shape(self, x: Tensor, number: int, to_heads: bool) -> list[int]:
        """The shape of what this rank has afterwards."""
        layout, heads = self.layouts[number], self.heads[number]
        if to_heads:
            return [x.shape[0], len(self.heads_of(self.slot, heads)), layout.n, x.shape[3]]
        return [x.shape[0], heads, layout.lengths[self.slot], x.shape[3]]


def exchange_of(plan: AttentionPlan, tensors: Sequence[tuple[Layout, int]]) -> HeadExchange:
    """For tensors with these layouts over the plan's ranks, and this many heads."""
    peers = plan.head_group
    layouts = tuple(_compact([layout.ranks[peer] for peer in peers]) for layout, _ in tensors)
    heads = tuple(heads for _, heads in tensors)
    return HeadExchange(peers.index(plan.rank), peers, plan.p, plan.group, layouts, heads)


def _compact(ranks: Sequence[Sequence[Interval]]) -> Layout:
    """Positions among those that the group holds together."""
    new, offset = {}, 0
    for interval in sorted(i for held in ranks for i in held):
        new[interval] = (offset, offset + interval.length)
        offset += interval.length
    return Layout.of(offset, ([new[i] for i in held] for held in ranks))


decode = lru_cache(maxsize=4096)(HeadExchange.decode)


def program(xs: Sequence[Tensor], spec: str, to_heads: bool) -> list[Tensor]:
    """``exchange_heads`` in aten ops and a functional collective.

    To heads: (batch, heads, my positions, dim) -> (batch, my heads, all positions, dim); else the
    transpose.
    """
    exchange = decode(spec)
    slots, tensors = range(exchange.u), list(enumerate(xs))
    parts = [
        [exchange.part(x, i, slot, to_heads).reshape(-1) for i, x in tensors] for slot in slots
    ]
    shapes = [[exchange.block(x, i, slot, to_heads) for i, x in tensors] for slot in slots]
    send = [sum(part.numel() for part in to_slot) for to_slot in parts]
    receive = [sum(map(prod, from_slot)) for from_slot in shapes]
    flat, offset = _exchanged(torch.cat([*chain(*parts)]), receive, send, exchange), 0
    blocks: list[list[Tensor]] = [[] for _ in xs]
    for from_slot in shapes:
        for found, shape in zip(blocks, from_slot, strict=True):
            found.append(flat[offset : offset + prod(shape)].view(shape))
            offset += prod(shape)
    if to_heads:
        return [_in_order(*found) for found in zip(blocks, exchange.layouts, strict=True)]
    return [_all_heads(*found, exchange) for found in zip(blocks, exchange.heads, strict=True)]


def _exchanged(x: Tensor, receive: list[int], send: list[int], exchange: HeadExchange) -> Tensor:
    receives, sends = [0] * exchange.world, [0] * exchange.world
    for peer, received, sent in zip(exchange.peers, receive, send, strict=True):
        receives[peer], sends[peer] = received, sent
    return wait(all_to_all(x, receives, sends, exchange.group))


def _in_order(blocks: list[Tensor], layout: Layout) -> Tensor:
    """Blocks of positions, one of each slot, joined in global order."""
    pieces = [
        blocks[slot].narrow(2, run.start, run.stop - run.start)
        for slot, run in layout.gather_order()
    ]
    return torch.cat(pieces, 2) if pieces else blocks[0]


def _all_heads(blocks: list[Tensor], heads: int, exchange: HeadExchange) -> Tensor:
    """Blocks of heads, one of each slot, joined; those of the same head are added up."""
    if heads % exchange.u == 0:
        return torch.cat(blocks, 1)
    found: dict[int, list[Tensor]] = {}
    for slot, block in enumerate(blocks):
        found.setdefault(exchange.heads_of(slot, heads).start, []).append(block)
    return torch.cat([_sum(same) for _, same in sorted(found.items())], 1)


def _sum(blocks: list[Tensor]) -> Tensor:
    wide = accumulator(blocks[0].dtype)
    return reduce(torch.add, (block.to(wide) for block in blocks)).to(blocks[0].dtype)


@torch.library.custom_op(
    "mosaic::exchange_heads",
    mutates_args=(),
    schema="(Tensor[] xs, str spec, bool to_heads, *, int number=0) -> Tensor[]",
)
def exchange_heads(xs, spec, to_heads, *, number=0):
    """Sequence for heads (or back), for several tensors (batch, heads, seq, dim) at once."""
    return list(fresh([x.contiguous() for x in program(xs, spec, to_heads)], xs))


@exchange_heads.register_fake
def _(xs, spec, to_heads, *, number=0):
    exchange = decode(spec)
    return [x.new_empty(exchange.shape(x, i, to_heads)) for i, x in enumerate(xs)]


def _setup(ctx, inputs, keyword_only_inputs, output) -> None:
    _, ctx.spec, ctx.to_heads = inputs


def _backward(ctx, grads):
    return torch.ops.mosaic.exchange_heads(list(grads), ctx.spec, not ctx.to_heads), None, None


exchange_heads.register_autograd(_backward, setup_context=_setup)
