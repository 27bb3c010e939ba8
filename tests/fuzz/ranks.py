"""Ranks that try programs: a process that dies or hangs is an outcome, and is replaced."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

from fuzz.judge import Verdict
from rank_pool import RankPool

#: The worst comes first: a program's outcome is that of its worst rank.
OUTCOMES = ("died", "hang", "crash", "wrong", "refused", "torch", "unstable", "invalid", "ok")
HARMLESS = frozenset(OUTCOMES[5:])
BAD = frozenset(OUTCOMES[:4])
GRACE = 25.0  # seconds for the others, once one rank has failed


@dataclass
class FuzzRanks:
    """p ranks for one program after another."""

    pool: RankPool
    timeout: float = 120.0

    def try_out(self, fn: Callable[..., Verdict], *args: Any) -> Verdict:
        """The worst verdict of all ranks."""
        if not self.pool._ranks:
            self.pool._start()
        job = pickle.dumps((fn, args, {}))
        try:
            for _, connection in self.pool._ranks:
                connection.send_bytes(job)
            found = self._collected()
        except (BrokenPipeError, ConnectionResetError):
            self.pool.close()
            return Verdict("died", "a process was gone before the program came")
        outcomes = Counter(v.outcome for v in found)
        is_lost = any("device-side assert" in v.detail for v in found)  # CUDA fails from then on
        if outcomes.keys() - HARMLESS - {"refused"} or len(outcomes) > 1 or is_lost:
            self.pool.close()
        worst = min(found, key=lambda v: OUTCOMES.index(v.outcome))
        if worst.outcome == "hang":
            others = [v for v in found if v.outcome != "hang"]
            said = others[0].detail if others else ""
            return replace(worst, detail=f"{dict(outcomes)} {said}")
        if len(outcomes) > 1 and worst.outcome not in BAD:
            return Verdict("crash", f"ranks disagree: {dict(outcomes)} {worst.detail}")
        return worst

    def _collected(self) -> list[Verdict]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.pool._ranks)}
        found: dict[int, Verdict] = {}
        deadline = time.monotonic() + self.timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                found[rank] = received(connection)
                if found[rank].outcome not in HARMLESS:
                    deadline = min(deadline, time.monotonic() + GRACE)
        found |= self._left_alone(waiting, found)
        return [found[rank] for rank in sorted(found)]

    def _left_alone(self, waiting: dict[Any, int], found: dict[int, Verdict]) -> dict[int, Verdict]:
        """Ranks that wait for one that was refused. Its error would have ended its process, and
        with it the wait: then they count as refused, too."""
        if not waiting:
            return {}
        refused = [rank for rank, verdict in found.items() if verdict.outcome == "refused"]
        for rank in refused:
            self.pool._ranks[rank][0].kill()
        verdicts = {}
        for connection, rank in waiting.items():
            ended = bool(refused) and connection.poll(GRACE)
            answer = received(connection) if ended else Verdict("hang")
            gone = ended and answer.outcome in ("crash", "refused")
            verdicts[rank] = found[refused[0]] if gone else answer
        self.pool.close()
        return verdicts


def received(connection: Any) -> Verdict:
    try:
        ok, answer = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return Verdict("died", "the process died")
    return answer if ok else Verdict("crash", answer[-1500:])
