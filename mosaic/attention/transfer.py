"""Carrying out a hop: chunks of an axis go to the ranks that want them, and gradients come home.

Tensors are ``(batch, heads, seq, dim)``; several travel in one buffer, a row for each position.
All ranks of a group take part in every exchange, with nothing for those that they do not talk to:
one group is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from mosaic.attention.schedule import Hop
from mosaic.layout import Interval, Intervals, Layout, Run, common, joined_runs, placed
from mosaic.runtime.comm import all_gather, all_to_all, joined, padded, take_runs, wait

Tensors = tuple[Tensor, ...]
Parts = tuple[tuple[int, Intervals], ...]  # (peer, what of the axis)


@dataclass(frozen=True)
class Side:
    """One rank's side: its number among the ranks that share an axis, and theirs in the group."""

    rank: int
    members: tuple[int, ...]
    world: int
    group: str


@dataclass(frozen=True)
class Transfer:
    """A hop between known layouts. ``before``: what each rank holds, in the order of its memory.
    ``halo``: what each rank wants of the others, where that is not all of it."""

    side: Side
    hop: Hop
    before: Layout
    halo: Layout | None = None

    # --- who gets what: global facts ---------------------------------------------------------

    def part(self, source: int, receiver: int) -> Intervals:
        """What ``receiver`` gets of what ``source`` holds."""
        held = self.before.ranks[source]
        if self.halo is None or source == receiver:
            return held
        return common(held, self.halo.ranks[receiver])

    def parts(self, receiver: int) -> list[tuple[int, Intervals]]:
        """What ``receiver`` gets from each of its sources, in order of arrival."""
        sources = self.hop[receiver]
        if self.halo is not None and len(sources) > 1:
            near = {receiver, *self.before.holders(self.halo.ranks[receiver])}
            sources = tuple(source for source in sources if source in near)
        found = [(source, self.part(source, receiver)) for source in sources]
        return [(source, held) for source, held in found if held or self.halo is None]

    @cached_property
    def received(self) -> Parts:
        """What comes from other ranks to this one, in the order of the receive buffer."""
        me = self.side.rank
        return tuple(sorted((source, held) for source, held in self.parts(me) if source != me))

    @cached_property
    def wanted_of_me(self) -> Parts:
        """Who gets what this rank holds, itself included, in ascending order."""
        me = self.side.rank
        return tuple(
            (receiver, self.part(me, receiver))
            for receiver, sources in enumerate(self.hop)
            if me in sources
        )

    @cached_property
    def sent(self) -> Parts:
        """What goes from this rank to others, in the order of the send buffer."""
        return tuple((peer, held) for peer, held in self.wanted_of_me if peer != self.side.rank)

    @cached_property
    def sends_anything(self) -> bool:
        """Whether any rank gets anything from another one."""
        return any(
            held
            for receiver in range(self.before.p)
            for source, held in self.parts(receiver)
            if source != receiver
        )

    @cached_property
    def after(self) -> Layout:
        """What each rank then holds: sorted, so that what a row sees of it is in few stretches."""
        if self.is_identity:
            return self.before
        ranks = ((i for _, held in self.parts(r) for i in held) for r in range(self.before.p))
        return Layout.of(self.before.n, (sorted(held) for held in ranks))

    @cached_property
    def is_identity(self) -> bool:
        return all(sources == (rank,) for rank, sources in enumerate(self.hop))

    @cached_property
    def is_silent(self) -> bool:
        """Whether no rank gets anything at all, its own included."""
        return not any(self.after.lengths)

    @cached_property
    def is_gather(self) -> bool:
        """Whether everybody gets everything (or everything but its own, of several): one
        all-gather, which repeats nothing in what is sent and is the fastest collective there is."""
        p = self.before.p
        if p != self.side.world or self.halo is not None:
            return False
        everything = set(range(p))
        return all(len(got) > 1 and {rank, *got} == everything for rank, got in enumerate(self.hop))

    # --- there ---------------------------------------------------------------------------------

    def start(self, xs: Tensors, packed: dict[Intervals, Tensor] | None = None) -> Tensor | None:
        """Start sending; None where nothing has to travel. ``packed``: buffers of ``xs``, to be
        shared by hops that send the same."""
        me = self.side.rank
        if self.is_identity:
            return None
        if self.is_gather:
            mine = padded(_rows(xs), max(self.before.lengths))
            return all_gather(mine, self.before.p, self.side.group)
        packed = {} if packed is None else packed  # several ranks may get the same
        for _, held in self.sent:
            if held not in packed:
                packed[held] = _rows(_take(xs, self.before, me, held))
        chunks = [packed[held] for _, held in self.sent]
        return self._exchange(chunks, self.sent, self.received, xs)

    def finish(self, pending: Tensor | None, xs: Tensors) -> Tensors:
        """All that this rank holds afterwards, in the order of ``after``."""
        if self.is_identity:
            return xs
        if self.is_gather:  # its own chunk came back with the others
            assert pending is not None
            longest = max(self.before.lengths)
            parts = self.parts(self.side.rank)
            came = [at for source, held in parts for at in placed(held, source * longest)]
            return _sorted([(came, _unrowed(wait(pending), xs))])
        arrived, offset = [], 0
        for _, held in self.received:
            arrived += placed(held, offset)
            offset += _length(held)
        me = self.side.rank
        own = self.part(me, me) if me in self.hop[me] else ()
        blocks = [(placed(own), _take(xs, self.before, me, own))]
        if pending is not None:
            blocks.append((arrived, _unrowed(wait(pending), xs)))
        return _sorted(blocks)

    # --- and back ------------------------------------------------------------------------------

    def start_back(self, grads: Tensors) -> Tensor | None:
        """Start sending what belongs to the sources: each gets its part."""
        if self.is_identity:
            return None
        going = tuple(interval for _, held in self.received for interval in held)
        chunks = [_rows(_take(grads, self.after, self.side.rank, going))] if going else []
        return self._exchange(chunks, self.received, self.sent, grads)

    def finish_back(self, pending: Tensor | None, own: Tensors) -> list[Returned]:
        """What came back for the chunk that this rank held before.

        ``own``: what was here, of which its own part did not travel; maybe in a better dtype.
        """
        me = self.side.rank
        if self.is_identity:
            return [Returned((Run(0, self.before.lengths[me]),), own)]
        arrived = own if pending is None else _unrowed(wait(pending), own)
        found, offset = [], 0
        for (is_mine, held), same in groupby(self.wanted_of_me, lambda w: (w[0] == me, w[1])):
            where, count = _runs(self.before, me, held), len(list(same))
            if is_mine:
                found.append(Returned(where, _take(own, self.after, me, held)))
                continue
            rows = count * _length(held)
            parts = tuple(x.narrow(2, offset, rows) for x in arrived)
            found.append(Returned(where, parts, count))
            offset += rows
        return found

    def _exchange(
        self, chunks: list[Tensor], send: Parts, receive: Parts, like: Tensors
    ) -> Tensor | None:
        """One all-to-all over the whole group; none where all ranks know that nobody sends."""
        if not self.sends_anything:
            return None
        sends, receives = [0] * self.side.world, [0] * self.side.world
        for peer, held in send:
            sends[self.side.members[peer]] = _length(held)
        for peer, held in receive:
            receives[self.side.members[peer]] = _length(held)
        if not chunks:
            chunks = [_rows(tuple(x.narrow(2, 0, 0) for x in like))]
        buffer = joined(chunks, 0).contiguous()
        return all_to_all(buffer, receives, sends, self.side.group)


class Returned(NamedTuple):
    """What came back for a chunk, from ``ranks`` ranks one behind the other: for these stretches of
    the chunk (batch, heads, ranks x their rows, dim)."""

    where: tuple[Run, ...]
    parts: Tensors
    ranks: int = 1

    def stacked(self) -> Tensors:
        """(batch, heads, ranks, rows, dim)"""
        rows = sum(run.length for run in self.where)
        return tuple(x.unflatten(2, (self.ranks, rows)) for x in self.parts)


def summed(found: Sequence[Returned], length: int, like: Tensors) -> Tensors:
    """Gradients for ``length`` rows from all that came back, in ``like``'s dtypes."""
    totals: list[Tensor | None] = [None] * len(like)
    for back in found:
        parts = back.parts if back.ranks == 1 else back.stacked()
        for i, (part, x) in enumerate(zip(parts, like, strict=True)):
            one = part.to(x.dtype) if back.ranks == 1 else part.sum(2, dtype=x.dtype)
            spread = _spread(one, back.where, length)
            before = totals[i]
            totals[i] = spread if before is None else before + spread
    return tuple(
        x.new_zeros([*x.shape[:2], length, x.shape[3]]) if total is None else total
        for x, total in zip(like, totals, strict=True)
    )


def _spread(x: Tensor, where: tuple[Run, ...], length: int) -> Tensor:
    """Rows put where they belong among ``length`` rows of zeros."""
    pieces, offset, done = [], 0, 0
    for start, stop, _ in where:
        pieces += [_zeros(x, start - done), x.narrow(2, offset, stop - start)]
        offset, done = offset + stop - start, stop
    pieces.append(_zeros(x, length - done))
    pieces = [piece for piece in pieces if piece.shape[2]]
    return joined(pieces, 2) if pieces else x


def _zeros(x: Tensor, rows: int) -> Tensor:
    return x.new_zeros([*x.shape[:2], rows, x.shape[3]])


# --- rows and buffers ------------------------------------------------------------------------


def _length(held: Intervals) -> int:
    return sum(interval.length for interval in held)


def _runs(layout: Layout, rank: int, held: Intervals) -> tuple[Run, ...]:
    """Where ``held`` lies in ``rank``'s memory."""
    return joined_runs(run for interval in held for run in layout.runs(rank, *interval))


def _take(xs: Tensors, layout: Layout, rank: int, held: Intervals) -> Tensors:
    runs = _runs(layout, rank, held)
    return tuple(take_runs(x, runs, 2) for x in xs)


def _rows(xs: Tensors) -> Tensor:
    """A buffer with a row for each position: so chunks that arrive in order are already joined."""
    return joined([x.permute(2, 0, 1, 3).flatten(1) for x in xs], 1)


def _unrowed(buffer: Tensor, like: Tensors) -> Tensors:
    """Views of a buffer as (batch, heads, rows, dim); ``like`` gives the other sizes only. Copies
    where rows do not begin at multiples of 16 bytes: kernels load as many at once."""
    out, start, itemsize = [], 0, buffer.element_size()
    for x in like:
        b, h, _, d = x.shape
        columns = buffer.narrow(1, start, b * h * d)
        part = columns.view(buffer.shape[0], b, h, d).permute(1, 2, 0, 3)
        is_aligned = start * itemsize % 16 == buffer.shape[1] * itemsize % 16 == 0
        out.append(part if is_aligned else part.contiguous())
        start += b * h * d
    return tuple(out)


def _sorted(blocks: list[tuple[list[tuple[Interval, Run]], Tensors]]) -> Tensors:
    """Blocks of rows joined in global order; no copy where they lie in one block in that order."""
    found = sorted(
        (interval, number, run) for number, (held, _) in enumerate(blocks) for interval, run in held
    )
    if not found:
        return tuple(x.narrow(2, 0, 0) for x in blocks[0][1])
    pieces = [
        (blocks[number][1], joined_runs(run for _, _, run in neighbours))
        for number, neighbours in groupby(found, key=itemgetter(1))
    ]
    return tuple(
        joined([take_runs(xs[i], runs, 2) for xs, runs in pieces], 2)
        for i in range(len(blocks[0][1]))
    )
