"""Looks, beside the program, whether the ranks are there with which it runs compiled graphs.

A collective waits without a word: for a rank that is late, and on GPUs for many minutes for one
that is gone. A thread reads what ranks leave in the store when they begin to run a graph, and says
whom this one waits for. On a GPU it ends a process that waits for a rank that is gone.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mosaic.runtime import rendezvous
from mosaic.runtime.rendezvous import has_ended, has_left, process_of, runs_key, runs_of
from mosaic.torch_private import default_store

log = logging.getLogger(__name__)

#: Seconds for which a GPU has been at work since a rank is gone, until the process is ended.
END_AFTER = 20.0
#: Seconds for which a process that ends in an error looks whether another one has ended before.
LAST_LOOK = 1.5
#: Of how many ranks one asks the store in a second.
RANKS_A_SECOND = 8


@dataclass
class Watch:
    """What this rank, ``me``, knows of the others in a group, and of their ``processes``. ``turn``:
    the run that some have not come to, ``since`` when, and after how long that is said; ``gone``:
    who, and since when."""

    me: int
    processes: dict[int, tuple[str, int]]
    key: str
    device: torch.device
    store: dist.Store
    turn: int = 0
    since: float = 0.0
    say_after: float = 0.0
    gone: dict[int, float] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def others(self) -> list[int]:
        return [*self.processes]

    def run(self, pause: float) -> None:
        while not self.over.wait(pause):
            self.look()
            self.end_if_waiting()

    def look(self) -> None:
        try:
            mine = runs_of(self.store, self.key, self.me)
            behind = [rank for rank in self.others if runs_of(self.store, self.key, rank) < mine]
            left = [rank for rank in self.others if has_left(self.store, rank)]
        except RuntimeError:  # the store has gone with the rank that keeps it
            behind, left = self.others, []
        else:
            self.say_late(behind, mine)
        for rank in self.others:
            if rank in left and rank not in behind:
                continue  # it has done its part
            if rank in left or has_ended(*self.processes[rank]):
                self.say_gone(rank)

    def say_gone(self, rank: int) -> None:
        if rank not in self.gone:
            self.gone[rank] = time.monotonic()
            log.error(
                "ranks [%d] are gone, and rank %d runs compiled graphs with them: look for what "
                "they said before they ended",
                rank,
                self.me,
            )

    def say_late(self, behind: list[int], turn: int) -> None:
        now = time.monotonic()
        if turn != self.turn or not behind:
            self.turn, self.since, self.say_after = turn, now, rendezvous.SAY_AFTER
        waited = now - self.since
        if waited > self.say_after:
            log.warning(
                "rank %d waits for ranks %s to run a compiled graph, its run %d (%d s)",
                self.me,
                behind,
                turn,
                waited,
            )
            self.say_after *= 4

    def end_if_waiting(self) -> None:
        """What comes out of a collective that is given up is no number: so the process ends, as
        torch's own watchdog does it after ten minutes. (gloo raises an error by itself.)"""
        if not self.gone or self.device.type != "cuda":
            return
        now = time.monotonic()
        if torch.cuda.default_stream(self.device).query():
            self.gone = dict.fromkeys(self.gone, now)  # nothing waits: they had done their part
        elif now - max(self.gone.values()) > END_AFTER:
            log.critical("rank %d waits for ranks %s, and is ended", self.me, [*self.gone])
            faulthandler.dump_traceback(sys.stderr)
            sys.stdout.flush()
            os._exit(1)


_watches: dict[dist.ProcessGroup, Watch] = {}


def watch(group: dist.ProcessGroup, device: torch.device) -> None:
    """Begin to look after the ranks of a group, once."""
    if group in _watches or dist.get_backend(group) == "fake":
        return
    me, ranks, store = dist.get_rank(), dist.get_process_group_ranks(group), default_store()
    others = {rank: process_of(store, rank) for rank in ranks if rank != me}
    _watches[group] = about = Watch(me, others, runs_key(group), device, store)
    pause = max(rendezvous.LOOK_AFTER, len(ranks) / RANKS_A_SECOND)
    threading.Thread(target=about.run, args=(pause,), name="mosaic-watch", daemon=True).start()


def stop() -> None:
    """Look no more: the ranks part in peace."""
    while _watches:
        _watches.popitem()[1].over.set()


def look_once_more() -> None:
    """After an error in a run: that a connection is closed (gloo's error) is known before it can be
    seen that the other process has ended."""
    until = time.monotonic() + LAST_LOOK
    while _watches and time.monotonic() < until:
        for about in [*_watches.values()]:
            about.look()
            if about.gone:
                return
        time.sleep(0.05)
