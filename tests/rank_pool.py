"""Real gloo ranks for tests: processes that are forked once and then run one job after another.

>>> pool = RankPool(4)
>>> pool.run(jobs.my_rank)  # a function of an importable module, called on every rank
[0, 1, 2, 3]
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import chdir
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

# After one rank failed the others may wait for it in a collective for ever.
_GRACE = 2.0
#: What each rank's first compile would import.
_IMPORTED = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.lowering")


class RankError(RuntimeError):
    """A job failed, or hung, on some rank; the message has the rank and its traceback."""


class RankPool:
    """p forked processes in one group: of gloo, or of NCCL with a GPU for each (``device="cuda"``,
    for which this process must not have used CUDA). A failed job costs them their lives, not the
    pool."""

    def __init__(self, p: int, timeout: float = 180.0, device: str = "cpu"):
        self.p = p
        self.device = device
        self.timeout = timeout
        self._ranks: list[tuple[Any, Connection]] = []

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank; the results in rank order, on the CPU.

        ``fn`` goes by its name, so it must stand in a module that the ranks can import. After
        every job Mosaic's context is shut down, Dynamo is reset and what was said once may be said
        again: no job sees another's.
        """
        if not self._ranks:
            self._start()
        job = pickle.dumps((fn, args, kwargs))
        for _, connection in self._ranks:
            connection.send_bytes(job)
        return self._collect(self.timeout if timeout is None else timeout)

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []

    def _start(self) -> None:
        for name in _IMPORTED:  # once, before the fork
            importlib.import_module(name)
        fork = multiprocessing.get_context("fork")
        rendezvous = os.path.join(tempfile.mkdtemp(prefix="ranks"), "store")
        for rank in range(self.p):
            here, there = fork.Pipe()
            process = fork.Process(
                target=_serve, args=(there, rank, self.p, rendezvous, self.device), daemon=True
            )
            process.start()
            there.close()
            self._ranks.append((process, here))

    def _collect(self, timeout: float) -> list[Any]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, answer = False, "the process died"
                (results if ok else failures)[rank] = answer
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE)
        if failures or waiting:
            self.close()
            raise RankError(_report(failures, sorted(waiting.values()), self.p, timeout))
        return [results[rank] for rank in range(self.p)]


def _report(failures: dict[int, str], silent: list[int], p: int, timeout: float) -> str:
    lines = [f"rank {rank} of {p} failed:\n{text}" for rank, text in sorted(failures.items())]
    if silent and not failures:
        lines.append(f"no answer within {timeout:g} s from ranks {silent} of {p}")
    elif silent:
        lines.append(f"ranks {silent} of {p} were still at work, and were stopped")
    return "\n".join(lines)


# --- in the rank -------------------------------------------------------------------------------


def _serve(connection: Connection, rank: int, p: int, rendezvous: str, device: str) -> None:
    torch.set_num_threads(1)  # first: OpenMP with more threads hangs after a fork
    _leave_parent()
    said = f"rank {rank} of {p}: %(name)s: %(message)s"
    logging.basicConfig(format=said, force=True)  # to stderr, not to the parent's handlers
    gc.freeze()  # what the parent has imported stays: no collection need look at it
    gc.set_threshold(50_000, 20, 20)  # else a compile spends a tenth of its time on collections
    startup: BaseException | None = None
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.FileStore(rendezvous, p), rank=rank, world_size=p
        )
    except BaseException as error:  # told as the first job's answer
        startup = error
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(job, startup))
        gc.collect()
        gc.freeze()  # torch's caches grow with each program, and collections with them


def _answer(job: bytes, startup: BaseException | None) -> bytes:
    try:
        if startup is not None:
            raise startup
        fn, args, kwargs = pickle.loads(job)
        with chdir("."), mock.patch.dict(os.environ):  # a job leaves both as they were
            answer = tree_map_only(torch.Tensor, _plain, fn(*args, **kwargs))
        _clean_up()
        return pickle.dumps((True, answer))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()  # a clone: a view would be pickled with all it views


def _leave_parent() -> None:
    """Drop what the fork has inherited: a (fake) process group, a context, compile threads."""
    _clean_up()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if "torch._inductor.config" in sys.modules:  # it has read the environment already
        sys.modules["torch._inductor.config"].compile_threads = 1


def _clean_up() -> None:
    forget_what_was_said()
    if "mosaic.runtime.mesh" in sys.modules:
        context = sys.modules["mosaic.runtime.mesh"].current_context()
        if context is not None:
            context.shutdown()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def forget_what_was_said() -> None:
    """A test hears what is said once per process, whichever tests ran before it."""
    if "mosaic.frontend.user_warnings" in sys.modules:
        sys.modules["mosaic.frontend.user_warnings"]._said.clear()
