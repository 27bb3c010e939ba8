"""What one rank sends and receives when an axis changes its layout."""

from __future__ import annotations

from typing import NamedTuple

from mosaic.layout.intervals import Run, cut, joined_runs, placed
from mosaic.layout.layout import Layout


class Exchange(NamedTuple):
    """One rank's side of an ``all_to_all_single``, in elements of the axis.

    ``take`` cuts the shard into the send buffer, ``send`` and ``receive`` are the splits, and
    ``place`` puts the receive buffer into the memory order of the new layout.
    """

    take: tuple[Run, ...]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    place: tuple[Run, ...]


def exchange(source: Layout, target: Layout, rank: int) -> Exchange:
    """What ``rank`` sends and receives when an axis changes from one partition to another. A peer's
    pieces travel in the order of the receiver's memory."""
    take: list[Run] = []
    send, receive = [], []
    held = sorted(placed(source.ranks[rank]))
    for wanted in target.ranks:
        runs = [run for interval in wanted for _, run in cut(held, interval)]
        send.append(sum(run.length for run in runs))
        take += runs
    arrived, offset = [], 0  # (where it belongs in memory, where it lies in the receive buffer)
    wants = placed(target.ranks[rank])
    for peer in source.ranks:
        theirs, before = sorted(placed(peer)), offset
        for interval, run in wants:
            for piece, _ in cut(theirs, interval):
                belongs = run.start + piece.start - interval.start
                arrived.append((belongs, Run(offset, offset + piece.length)))
                offset += piece.length
        receive.append(offset - before)
    place = joined_runs(run for _, run in sorted(arrived))
    return Exchange(joined_runs(take), tuple(send), tuple(receive), place)
