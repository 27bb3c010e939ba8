"""What ranks say when one of them is killed, late, or given something else in the third step.

Each fault is a small training run of its own: a GPT in float64, compiled for all ranks. Who is left
must say what happened within a minute, nobody may hang, and no loss may be wrong. One rank of them
runs by itself as ``python rank_faults.py FAULT SECONDS`` with torchrun's environment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]

import torch  # noqa: E402
from case_runner import CUDA, SLOWER, Case, Row, Setting, environment, free_port  # noqa: E402
from models.gpt import GPT  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import mosaic  # noqa: E402

STEPS, FAULTY = 5, 3
#: Seconds until a rank must have said it, and until the ranks have begun.
SAID, BEGUN = 60.0, SLOWER * 100.0


@dataclass(frozen=True)
class Fault:
    """``says``: what one that is left writes; ``ends``: whether the run is over then; ``rank``:
    whose it is."""

    name: str
    says: str
    ends: bool = True
    rank: int = -1


FAULTS = {
    "killed": Fault("a rank killed in step 3", r"ranks \[\d\] are gone"),
    "first": Fault("the first one, with the store", r"ranks \[0\] are gone", rank=0),
    "batch": Fault("a rank with another batch", r"given different data: argument ids"),
    "length": Fault("a rank with another length", r"(run different graphs|are gone)"),
    "late": Fault("a rank that is late", r"waits for ranks \[\d\]", ends=False),
}


# --- one rank -------------------------------------------------------------------------------------


def model_and_texts(device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = GPT(vocab=31, context=64, embed=32, heads=4, layers=2).double()
    draw = torch.Generator().manual_seed(1)
    return model.to(device), torch.randint(31, (STEPS, 2, 61), generator=draw).to(device)


def train(fault: str, late: float) -> None:
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    context = mosaic.init(sp_size=None)
    is_faulty = context.rank() == FAULTS[fault].rank % context.size()
    model, texts = model_and_texts(context.device)
    spec = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
    called = torch.compile(model, backend="mosaic", options={"spec": spec, "inner": "eager"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, STEPS + 1):
        ids = texts[step - 1]
        if is_faulty and step == FAULTY:
            tell(fault=time.time())
            if fault == "late":
                time.sleep(late)
            ids = {"batch": ids.flip(0), "length": ids[:, :-2]}.get(fault, ids)
        loss = called(ids, ids)[1]
        tell(step=step, loss=loss.item())
        if is_faulty and step == FAULTY and fault in ("killed", "first"):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    context.shutdown()


def tell(**what: float) -> None:
    print(json.dumps(what), flush=True)


def expected() -> list[float]:
    """The losses of one process without Mosaic."""
    model, texts = model_and_texts(torch.device("cpu"))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for ids in texts:
        loss = model(ids, ids)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- all of them ----------------------------------------------------------------------------------


@dataclass
class Rank:
    """A process and what it has written."""

    process: subprocess.Popen
    folder: tempfile.TemporaryDirectory

    @classmethod
    def start(cls, fault: str, late: float, rank: int, p: int, port: int) -> Rank:
        folder = tempfile.TemporaryDirectory(prefix="fault")
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (
            open(Path(folder.name, "out"), "w") as out,
            open(Path(folder.name, "error"), "w") as error,
        ):
            process = subprocess.Popen(
                [sys.executable, __file__, fault, str(late)],
                env=os.environ | where | environment(rank, p),
                stdout=out,
                stderr=error,
            )
        return cls(process, folder)

    @property
    def told(self) -> list[dict[str, Any]]:
        lines = Path(self.folder.name, "out").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def errors(self) -> str:
        return Path(self.folder.name, "error").read_text()


def judged(name: str, setting: Setting) -> Row:
    fault, port, p = FAULTS[name], free_port(), setting.ranks
    ranks = [Rank.start(name, setting.late, rank, p, port) for rank in range(p)]
    left = [*ranks]
    faulty = left.pop(fault.rank)
    try:
        began = wait_for(lambda: any("fault" in x for x in faulty.told), BEGUN)
        assert began is not None, f"did not begin: {ranks[0].errors[-300:]}"
        said = wait_for(lambda: any(re.search(fault.says, rank.errors) for rank in left), SAID)
        rest = SAID + setting.late
        ended = wait_for(lambda: all(rank.process.poll() is not None for rank in ranks), rest)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
    found = next((m for rank in left if (m := re.search(f".*{fault.says}.*", rank.errors))), None)
    wrong = wrong_losses(ranks)
    codes = [rank.process.returncode for rank in left]
    right = said is not None and ended is not None and not wrong
    right &= all(codes) if fault.ends else not any(codes)
    numbers = {"said after s": seconds(said), "ended after s": seconds(ended), "wrong": wrong}
    last = left[0].errors.strip().splitlines()[-1:]
    words = found[0][:150] if found else f"instead: {last}"
    return Row(f"{fault.name}, p = {p}", f"left with {codes}", numbers, words, right)


def wrong_losses(ranks: list[Rank]) -> int:
    """How many losses were printed that are not those of one process."""
    want = expected()
    told = [x for rank in ranks for x in rank.told if "loss" in x]
    return sum(abs(x["loss"] / want[x["step"] - 1] - 1) > 1e-8 for x in told)


def wait_for(condition: Callable[[], bool], limit: float) -> float | None:
    """After how many seconds it held."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit:
        if condition():
            return time.monotonic() - begin
        time.sleep(0.2)
    return None


def seconds(found: float | None) -> float:
    return float("nan") if found is None else found


def everything(setting: Setting) -> Iterator[Row]:
    """On GPUs at the same time: they wait more than they work."""
    with ThreadPoolExecutor(len(FAULTS) if CUDA else 1) as pool:
        yield from pool.map(partial(judged, setting=setting), FAULTS)


def case(late: float) -> Case:
    limit = BEGUN + 2 * SAID + late
    return Case("faults", everything, limit if CUDA else limit * len(FAULTS) / SLOWER)


if __name__ == "__main__":
    train(sys.argv[1], float(sys.argv[2]))
