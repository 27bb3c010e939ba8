"""Carrying out a hop: chunks of an axis go to the ranks that want them, and gradients come home.

Tensors are ``(batch, heads, seq, dim)``; several travel in one buffer, a row for each position.
All ranks of a group take part in every exchange, with nothing for those that they do not talk to:
one group is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

from torch import Tensor

from mosaic.attention.schedule import Hop
from mosaic.layout import Interval, Intervals, Layout, Run, joined_runs, placed
from mosaic.moves import all_gather, all_to_all, joined, padded, take_runs, wait

Tensors = tuple[Tensor, ...]
#: (receiver, what the sender holds) -> what of it the receiver wants.
Wanted = Callable[[int, Intervals], Intervals]


@dataclass(frozen=True)
class Side:
    """One rank's side: its number among the ranks that share an axis, and theirs in the group."""

    rank: int
    members: tuple[int, ...]
    world: int
    group: str


@dataclass(frozen=True)
class Crossing:
    """A hop between known layouts. ``before``: what each rank holds, in the order of its memory."""

    side: Side
    hop: Hop
    before: Layout
    wanted: Wanted | None = None

    # --- who gets what: global facts ---------------------------------------------------------

    def parts(self, receiver: int) -> list[tuple[int, Intervals]]:
        """What ``receiver`` gets from each of its sources, in order of arrival."""
        found = []
        for source in self.hop[receiver]:
            held = self.before.ranks[source]
            if self.wanted is not None and source != receiver:
                held = self.wanted(receiver, held)
            found.append((source, held))
        return found

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
        if p != self.side.world or self.wanted is not None:
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
        chunks, send, receive = [], [0] * self.before.p, [0] * self.before.p
        packed = {} if packed is None else packed  # several ranks may get the same
        for receiver in range(self.before.p):
            for source, held in self.parts(receiver):
                if source == me != receiver:
                    if held not in packed:
                        packed[held] = _rows(_take(xs, self.before, me, held))
                    chunks.append(packed[held])
                    send[receiver] = _length(held)
                if receiver == me != source:
                    receive[source] = _length(held)
        return self._exchange(chunks, send, receive, xs)

    def finish(self, pending: Tensor | None, xs: Tensors) -> Tensors:
        """All that this rank holds afterwards, in the order of ``after``."""
        if self.is_identity:
            return xs
        me, longest = self.side.rank, max(self.before.lengths)
        own: Intervals = ()
        arrived, offset = [], 0
        # A buffer holds the chunks by the number of their source; ``parts`` may have another order.
        for source, held in sorted(self.parts(me)):
            if self.is_gather:
                arrived += placed(held, source * longest)
            elif source == me:
                own = held
            else:
                arrived += placed(held, offset)
                offset += _length(held)
        blocks = [(placed(own), _take(xs, self.before, me, own))]
        if pending is not None:
            blocks.append((arrived, _unrowed(wait(pending), xs)))
        return _sorted(blocks)

    # --- and back ------------------------------------------------------------------------------

    def start_back(self, grads: Tensors) -> Tensor | None:
        """Start sending what belongs to the sources: each gets its part."""
        me = self.side.rank
        if self.is_identity:
            return None
        chunks, send, receive = [], [0] * self.before.p, [0] * self.before.p
        for source, held in sorted(self.parts(me)):
            if source != me:
                chunks.append(_rows(_take(grads, self.after, me, held)))
                send[source] = _length(held)
        for receiver in range(self.before.p):
            for source, held in self.parts(receiver):
                if source == me != receiver:
                    receive[receiver] = _length(held)
        return self._exchange(chunks, send, receive, grads)

    def finish_back(
        self, pending: Tensor | None, own: Tensors
    ) -> list[tuple[tuple[Run, ...], Tensors]]:
        """What came back for the chunk that this rank held before: stretches of it, and their part.

        ``own``: what was here, of which its own part did not travel; maybe in a better dtype.
        """
        me = self.side.rank
        everything = (Run(0, self.before.lengths[me]),)
        if self.is_identity:
            return [(everything, own)]
        arrived = None if pending is None else _unrowed(wait(pending), own)
        found, offset = [], 0
        for receiver in range(self.before.p):
            for source, held in self.parts(receiver):
                if source != me:
                    continue
                where, rows = _runs(self.before, me, held), _length(held)
                if receiver == me:
                    found.append((where, _take(own, self.after, me, held)))
                    continue
                parts = own if arrived is None else arrived
                found.append((where, tuple(x.narrow(2, offset, rows) for x in parts)))
                offset += rows
        return found

    def _exchange(
        self, chunks: list[Tensor], send: list[int], receive: list[int], like: Tensors
    ) -> Tensor | None:
        """One all-to-all over the whole group; none where all ranks know that nobody sends."""
        if not any(
            held
            for receiver in range(self.before.p)
            for source, held in self.parts(receiver)
            if source != receiver
        ):
            return None
        receives, sends = [0] * self.side.world, [0] * self.side.world
        for peer, member in enumerate(self.side.members):
            receives[member], sends[member] = receive[peer], send[peer]
        if not chunks:
            chunks = [_rows(tuple(x.narrow(2, 0, 0) for x in like))]
        buffer = joined(chunks, 0).contiguous()
        return all_to_all(buffer, receives, sends, self.side.group)


def summed(parts: Sequence[tuple[tuple[Run, ...], Tensors]], length: int, like: Tensors) -> Tensors:
    """Gradients for ``length`` rows from all that came back, in ``like``'s dtypes."""
    totals: list[Tensor | None] = [None] * len(like)
    for where, tensors in parts:
        for i, tensor in enumerate(tensors):
            spread = _spread(tensor.to(like[i].dtype), where, length)
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
        (blocks[number][1], run)
        for number, neighbours in groupby(found, key=itemgetter(1))
        for run in joined_runs(run for _, _, run in neighbours)
    ]
    return tuple(
        joined([xs[i].narrow(2, a, b - a) for xs, (a, b, _) in pieces], 2)
        for i in range(len(blocks[0][1]))
    )
