"""Cases that run on ranks of their own, one after the other; each line is printed when it is known.

The parent starts a process for each rank and reads what rank 0 writes. A case that fails, or that
takes longer than it may, is a line: its ranks are killed where they hang, and fresh ones go on with
the case behind it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import torch
import torch.distributed as dist

import mosaic
from mosaic.api.errors import ShardingError
from mosaic.runtime.rendezvous import exchange

CUDA = torch.cuda.is_available()
#: Seconds until the ranks of a group have begun their first case; a CPU takes what it takes.
START = 120.0 if CUDA else 480.0
SLOWER = 1 if CUDA else 4
NOT_RUN = "not run"
#: Seconds that the others have to end a case in which one rank has failed: they may hang.
GRACE = SLOWER * 20.0


@dataclass(frozen=True)
class Setting:
    """What a case is told."""

    small: bool
    ranks: int  # of the machine: those of the group may be fewer
    context: mosaic.MosaicContext | None = None
    late: float = 40.0  # seconds by which a rank of a fault is late
    steps: int = 2  # of the whole model
    profile: bool = False  # say of each step what its kernels do at which time

    @property
    def here(self) -> mosaic.MosaicContext:
        assert self.context is not None
        return self.context


@dataclass(frozen=True)
class Row:
    """A line of the table. ``right``: None where nothing is compared."""

    case: str
    way: str
    numbers: dict[str, float] = field(default_factory=dict)
    words: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Case:
    """``run`` gives rows, on every rank; rank 0's count."""

    name: str
    run: Callable[[Setting], Iterator[Row]]
    seconds: float


@dataclass(frozen=True)
class Group:
    """Cases that share processes, one for each of ``ranks`` (0: no group of torch's). ``seconds``:
    its share of the time, which is stretched to what all may take."""

    name: str
    cases: Sequence[Case]
    ranks: int
    seconds: float


# --- the ranks ------------------------------------------------------------------------------------


def serve(group: Group, first: int, setting: Setting) -> int:
    """What a rank does: the cases from ``first`` on."""
    torch.set_num_threads(1 if not CUDA else 8)
    if group.ranks:
        if setting.ranks == 1:  # where mosaic.init needs none, and others do
            dist.init_process_group("nccl" if CUDA else "gloo")
        setting = replace(setting, context=mosaic.init(sp_size=None))
    for number, case in enumerate(group.cases[first:], first):
        tell("begin", number)
        said = outcome(case, setting)
        if said:
            tell("failed", [number, said])
        others = together(setting, said, case)
        if said or any(others):
            words = next((text for text in [said, *others] if text), "")
            tell("row", asdict(Row(case.name, "", words=words, right=False)))
        tell("end", number)
        if len({bool(text) for text in [said, *others]}) > 1:
            return 1  # ranks that did different things cannot go on
    return 0


def outcome(case: Case, setting: Setting) -> str:
    """Run a case; what went wrong."""
    try:
        for row in case.run(setting):
            tell("row", asdict(row))
        if CUDA:
            torch.cuda.synchronize()
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:150]}"
    finally:
        torch._dynamo.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return ""


def together(setting: Setting, said: str, case: Case) -> list[str]:
    """What went wrong on each rank; all come here, or this one is killed with the group."""
    group = setting.context.group() if setting.context else None
    if group is None:
        return []
    try:
        return exchange(group, said, "finish a case", SLOWER * case.seconds)
    except ShardingError as error:
        return [str(error).splitlines()[0]]


def tell(what: str, about: Any) -> None:
    if int(os.environ.get("RANK", 0)) == 0 or what == "failed":
        print("@" + json.dumps([what, about]), flush=True)


# --- the parent -----------------------------------------------------------------------------------


class Processes:
    """One process for each rank, each in a session of its own; ``lines`` come from rank 0, and from
    others that fail."""

    def __init__(self, command: Sequence[str], ranks: int):
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: IO[str] = tempfile.TemporaryFile("w+")
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = [
            subprocess.Popen(
                command,
                env=os.environ | where | environment(rank, ranks),
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                start_new_session=True,
            )
            for rank in range(ranks)
        ]
        for rank in range(ranks):
            threading.Thread(target=self._read, args=(rank,), daemon=True).start()

    def _read(self, rank: int) -> None:
        pipe = self.ranks[rank].stdout
        assert pipe is not None
        for line in pipe:
            if rank == 0 or line.startswith("@"):
                self.lines.put(line.rstrip("\n"))
        if rank == 0:
            self.lines.put(None)

    def line(self, deadline: float) -> str | None:
        """The next one; None where rank 0 has ended. Raises TimeoutError."""
        try:
            return self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None

    def end(self) -> str:
        """Kill what is left, with all that it started; the last error that was written."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        self.errors.seek(0)
        wrote = [text.strip() for text in self.errors.read().splitlines()]
        return next((t for t in reversed(wrote) if "Error" in t or "error" in t), "")[:150]


def environment(rank: int, ranks: int) -> dict[str, str]:
    """As torchrun's; NVLink's multicast stays off."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(n) for name, n in found.items()} | {"NCCL_NVLS_ENABLE": "0"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Runner:
    """Runs groups, and hands each row to ``show``. ``command``: of this script, for a rank."""

    command: Sequence[str]
    show: Callable[[Row], None]

    def run(self, group: Group, until: float) -> None:
        """``until``: on the monotonic clock."""
        first, count = 0, len(group.cases)
        while first < count:
            if time.monotonic() > until - 5:
                names = ", ".join(case.name for case in group.cases[first:])
                return self.show(Row(group.name, NOT_RUN, words=f"the time is over: {names}"))
            command = [*self.command, "--group", group.name, "--first", str(first)]
            processes = Processes(command, max(1, group.ranks))
            try:
                first = self._follow(group, first, processes, until)
            finally:
                processes.end()

    def _follow(self, group: Group, first: int, processes: Processes, until: float) -> int:
        """Read lines until the ranks end or hang; which case is next."""
        running, done, failure = False, first, ""
        deadline = time.monotonic() + START
        while True:
            try:
                line = processes.line(min(deadline, until))
            except TimeoutError:
                what = "the group's time is over" if time.monotonic() >= until else "no end"
                break
            if line is None:
                what = "the ranks ended"
                break
            if not line.startswith("@"):
                print(line, flush=True)
                continue
            kind, about = json.loads(line[1:])
            if (kind, about) == ("end", len(group.cases) - 1):
                return about + 1  # the ranks need not part
            if kind == "row":
                self.show(Row(**about))
            elif kind == "failed":
                if running and about[0] == done:
                    failure = failure or about[1]
                    deadline = min(deadline, time.monotonic() + GRACE)
            else:
                failure = ""
                running, done = kind == "begin", about + (kind == "end")
                deadline = time.monotonic() + (
                    SLOWER * group.cases[about].seconds if running else START
                )
        if not running and done > first:
            return done  # ranks that differed end between two cases, and have said why
        name = group.cases[done].name
        said = failure or f"{what}; {processes.end()}"
        self.show(Row(name, "", words=said, right=False))
        return done + 1
