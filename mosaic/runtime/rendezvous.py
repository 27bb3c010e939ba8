"""What ranks tell each other through the process group's store: no collective, so nothing hangs.

Every question has a number in its group, and every rank an answer to it. Whoever waits does so for
as long as the others may still come (another rank may compile for minutes), and says after a while
whom it waits for. It ends where nobody will come: a process is gone, or one of the late ranks waits
itself, for this rank: with another question, or in a graph that this one does not run.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch.distributed as dist

from mosaic.api.errors import MosaicError, ShardingError
from mosaic.torch_private import default_store

log = logging.getLogger(__name__)

COMPILE, RUN = "compile this graph", "run a compiled graph"
FAILED = "failed: "
#: Seconds until it is said whom a rank waits for, and until it looks whether they will come.
SAY_AFTER, LOOK_AFTER = 30.0, 1.0

_turns: dict[str, int] = defaultdict(int)  # for each group and kind of question
_notes: set[str] = set()  # what this rank has left in the store for ranks that wait for it


def exchange(
    group: dist.ProcessGroup, text: str, doing: str = COMPILE, within: float | None = None
) -> list[str]:
    """What every rank of the group says, in rank order.

    Raises MosaicError where a rank has failed, and ShardingError where one will never come, or has
    not come ``within`` so many seconds.
    """
    store, ranks, me = default_store(), dist.get_process_group_ranks(group), dist.get_rank()
    prefix = _key(group, doing)
    _turns[prefix] += 1
    turn = _turns[prefix]
    keys = {rank: f"{prefix}/{turn}/{rank}" for rank in ranks}
    _take_back(store)
    store.set(keys[me], text)
    said = _collect(store, keys, group, doing, within)
    # Whoever has answered this time has read what was said the last time.
    store.delete_key(f"{prefix}/{turn - 1}/{me}")
    return [said[rank] for rank in ranks]


def _collect(
    store: dist.Store,
    keys: dict[int, str],
    group: dist.ProcessGroup,
    doing: str,
    within: float | None,
) -> dict[int, str]:
    said: dict[int, str] = {}
    began, pause, say_after = time.monotonic(), 0.0005, SAY_AFTER
    while late := _late(store, keys, said):
        waited = time.monotonic() - began
        if waited > LOOK_AFTER:
            _note(store, group, "waits", doing)
            _check_they_come(store, late, keys, group, doing)
        if within is not None and waited > within:
            _take_question_back(store, keys[dist.get_rank()], group, doing)
            raise ShardingError(
                f"ranks {late} did not {doing} within {within:.0f} s, as rank {dist.get_rank()} did"
            )
        if waited > say_after:
            log.warning(
                "rank %d waits for ranks %s to %s (%d s); every rank must come to it, with inputs "
                "of the same sizes",
                dist.get_rank(),
                late,
                doing,
                waited,
            )
            say_after *= 4
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    _take_back(store)  # not after an error: the others have to see it, too
    return said


def _take_question_back(store: dist.Store, key: str, group: dist.ProcessGroup, doing: str) -> None:
    """As if it had not been asked: whoever catches the error may ask again."""
    store.delete_key(key)
    _turns[_key(group, doing)] -= 1
    _take_back(store)


def _late(store: dist.Store, keys: dict[int, str], said: dict[int, str]) -> list[int]:
    """Who has not answered; ``said`` grows by the others' answers."""
    for rank, key in keys.items():
        if rank not in said and store.check([key]):
            said[rank] = store.get(key).decode()
    _raise_failure(said)
    return [rank for rank in keys if rank not in said]


def _raise_failure(said: dict[int, str]) -> None:
    for rank, words in said.items():
        if words.startswith(FAILED):
            raise MosaicError(
                f"rank {rank} could not compile this graph",
                reason=words.removeprefix(FAILED),
                fix="see that rank's own error: what one rank cannot compile none runs",
            )


def _check_they_come(
    store: dist.Store, late: list[int], keys: dict[int, str], group: dist.ProcessGroup, doing: str
) -> None:
    """Raise ShardingError for a rank that is gone, or that waits for this one to do another thing.
    What it said before it went has been read already, or is there now."""
    gone = [r for r in late if is_gone(store, r) and not store.check([keys[r]])]
    if gone:
        raise ShardingError(
            f"ranks {gone} are gone: they did not {doing}",
            ranks=f"this is rank {dist.get_rank()} of {list(keys)}",
            fix="look for what they said before they ended; every rank must run the same program, "
            "and as often",
        )
    for rank in late:
        failed, waits = (_noted(store, group, about, rank) for about in ("failed", "waits"))
        if store.check([keys[rank]]):
            return  # it has come meanwhile
        _raise_failure({rank: failed})
        if waits not in ("", doing):
            raise ShardingError(
                f"rank {dist.get_rank()} waits for the others to {doing}, "
                f"and rank {rank} for them to {waits}",
                fix=SAME,
            )
        if runs_of(store, runs_key(group), rank) > _turns[runs_key(group)]:
            raise ShardingError(
                f"rank {dist.get_rank()} waits for the others to {doing}, "
                f"and rank {rank} runs one that is compiled already",
                fix=SAME,
            )


SAME = (
    "every rank must run the same program with inputs of the same sizes, "
    "in the same modes (no_grad, autocast, train or eval)"
)


def note_run(group: dist.ProcessGroup) -> None:
    """Say that this rank begins to run a compiled graph, in which it waits for the others."""
    prefix = runs_key(group)
    _turns[prefix] += 1
    default_store().set(f"{prefix}/{dist.get_rank()}", str(_turns[prefix]))


def runs_key(group: dist.ProcessGroup) -> str:
    return _key(group, RUN)


def runs_of(store: dist.Store, key: str, rank: int) -> int:
    """How many runs of compiled graphs a rank has begun; ``key``: the ``runs_key`` of the group."""
    found = f"{key}/{rank}"
    return int(store.get(found)) if store.check([found]) else 0


def _note(store: dist.Store, group: dist.ProcessGroup, about: str, text: str) -> None:
    """Leave word for ranks that wait with another question, with the count of questions so far."""
    key = f"{_key(group, about)}/{dist.get_rank()}"
    store.set(key, f"{_asked(group)} {text}")
    _notes.add(key)


def _noted(store: dist.Store, group: dist.ProcessGroup, about: str, rank: int) -> str:
    """What a rank has left about this question. What it left of an earlier one (after an error that
    somebody caught) is no news: ranks ask as many questions as each other."""
    key = f"{_key(group, about)}/{rank}"
    number, _, text = store.get(key).decode().partition(" ") if store.check([key]) else ("", "", "")
    return text if number and int(number) >= _asked(group) else ""


def _asked(group: dist.ProcessGroup) -> int:
    """How many questions this rank has had in the group."""
    end = _key(group, "").removeprefix("mosaic/")
    kinds = (kind for kind in _turns if kind.endswith(end) and kind != runs_key(group))
    return sum(_turns[kind] for kind in kinds)


def _take_back(store: dist.Store) -> None:
    while _notes:  # emptied: another rank may be about to read it
        store.set(_notes.pop(), "")


def report_failure(
    group: dist.ProcessGroup | None, error: BaseException, doing: str = COMPILE
) -> None:
    """Tell the others at once, so that they do not wait for this rank."""
    if group is None or dist.get_backend(group) == "fake":
        return
    prefix = _key(group, doing)
    _turns[prefix] += 1
    store = default_store()
    store.set(f"{prefix}/{_turns[prefix]}/{dist.get_rank()}", f"{FAILED}{error}")
    _note(store, group, "failed", f"{FAILED}{error}")  # for those who wait with another question


def _key(group: dist.ProcessGroup, doing: str) -> str:
    return f"mosaic/{doing}/" + "-".join(map(str, dist.get_process_group_ranks(group)))


# --- is a process gone? ---------------------------------------------------------------------------


def introduce() -> None:
    """Say which process this rank is, so that others can tell when it is gone."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return
    default_store().set(f"mosaic/process/{dist.get_rank()}", json.dumps([machine(), os.getpid()]))
    _say_goodbye_at_exit()


@cache
def _say_goodbye_at_exit() -> None:
    """A process that ends in an error says so, too; one that is killed is missed by its number."""
    me = os.getpid()

    def goodbye() -> None:
        if dist.is_initialized() and os.getpid() == me:
            with suppress(Exception):  # the store may have gone before
                default_store().set(f"mosaic/left/{dist.get_rank()}", "")

    atexit.register(goodbye)


@cache
def machine() -> str:
    """Processes of which this is equal can see each other by number; "" where nobody can tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def has_left(store: dist.Store, rank: int) -> bool:
    """Whether it has said so; one that is killed says nothing."""
    return bool(store.check([f"mosaic/left/{rank}"]))


def is_gone(store: dist.Store, rank: int) -> bool:
    """Whether a rank's process has ended, as far as can be seen from here."""
    if has_left(store, rank):
        return True
    return has_ended(*process_of(store, rank))


def process_of(store: dist.Store, rank: int) -> tuple[str, int]:
    """Its ``machine`` and its number; no machine where it has not introduced itself."""
    key = f"mosaic/process/{rank}"
    where, number = json.loads(store.get(key)) if store.check([key]) else ("", 0)
    return where, number


def has_ended(where: str, number: int) -> bool:
    """Whether a process is seen from here, and is no more."""
    if not where or where != machine():
        return False
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"  # ended, and its parent has not looked
