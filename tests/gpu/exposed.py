"""What the kernels of one step do at which time: compute, and communication that nothing hides.

    compute      |----|  |-------|            sums: compute 11, all-gather 10, all-to-all 5
    all-gather      |--------|                exposed: 2 of the all-gather (between the two above)
    all-to-all                 |----|                  3 of the all-to-all (after the last)

Kernels come from the trace that torch.profiler writes, on all streams of one GPU. Copies between
GPUs, and to and from the CPU, count as communication; copies on the GPU as compute.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from case_runner import CUDA, Row, Setting
from torch.profiler import ProfilerActivity

#: A stretch of time, from and to.
Span = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """``sends``: the collective that it is, or the kind of copy; nothing for one that computes."""

    sends: str
    span: Span


@dataclass(frozen=True)
class Exposure:
    """Milliseconds. ``exposed``: in which something is sent and nothing computes, of all and by
    name: where two are sent at a time, both names have it."""

    compute: float
    communication: float
    exposed: float
    by_name: Mapping[str, float]

    @property
    def numbers(self) -> dict[str, float]:
        return {
            "compute ms": self.compute,
            "sending ms": self.communication,
            "exposed ms": self.exposed,
        }

    def row(self, of: Row) -> Row:
        """The line behind that of the step."""
        return Row(of.case, f"{of.way}: profile", self.numbers, str(self))

    def __str__(self) -> str:
        if not self.compute:
            return "the profile has no kernel that computes"
        parts = sorted(self.by_name.items(), key=lambda part: -part[1])
        return "exposed: " + (", ".join(f"{name} {ms:.2f}" for name, ms in parts) or "nothing")


# --- intervals ------------------------------------------------------------------------------------


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same time in stretches that are apart, in order.

    >>> joined([(5, 6), (0, 2), (1, 3), (3, 4)])
    [(0, 4), (5, 6)]
    """
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """What is left of the time of ``spans`` outside of ``others``.

    >>> without([(0, 10)], [(2, 3), (5, 12)])
    [(0, 2), (3, 5)]
    """
    left, hidden, first = [], joined(others), 0
    for start, stop in joined(spans):
        while first < len(hidden) and hidden[first][1] <= start:
            first += 1
        number = first
        while number < len(hidden) and hidden[number][0] < stop:
            begin, end = hidden[number]
            if begin > start:
                left.append((start, begin))
            start, number = max(start, end), number + 1
        if start < stop:
            left.append((start, stop))
    return left


def length(spans: Iterable[Span]) -> float:
    return sum(stop - start for start, stop in spans)


def exposure(kernels: Sequence[Kernel]) -> Exposure:
    """Of spans in microseconds."""
    sent: dict[str, list[Span]] = defaultdict(list)
    for kernel in kernels:
        sent[kernel.sends].append(kernel.span)
    compute = sent.pop("", [])
    everything = [span for spans in sent.values() for span in spans]
    by_name = {name: length(without(spans, compute)) / 1e3 for name, spans in sent.items()}
    return Exposure(
        compute=length(compute) / 1e3,
        communication=length(everything) / 1e3,
        exposed=length(without(everything, compute)) / 1e3,
        by_name={name: ms for name, ms in by_name.items() if ms},
    )


# --- from a profile -------------------------------------------------------------------------------


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Of a trace in Chrome's format."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event:
            start = float(event["ts"])
            found.append(Kernel(sends(event), (start, start + float(event["dur"]))))
    return found


def sends(event: Mapping[str, Any]) -> str:
    """``allgather_base over mesh_sp``, ``Memcpy DtoH``; nothing for what computes."""
    name, about = event["name"], event.get("args", {})
    if copy := re.match(r"Memcpy (PtoP|DtoH|HtoD)", name):
        return copy[0]
    kernel = re.match(r"nccl(?:DevKernel|Kernel)?_?(\w+?)(?:_|\(|$)", name)
    if not kernel:
        return ""
    group = about.get("Process Group Description", "")
    collective = about.get("Collective name", kernel[1]).strip("_")
    return f"{collective} over {group}" if group else collective


def profiled(step: Callable[[], object]) -> Exposure:
    """Of the second of two steps, which all ranks profile: none is later than the others."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * CUDA]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")

        def write(profile: torch.profiler.profile) -> None:
            profile.export_chrome_trace(str(path))

        with torch.profiler.profile(
            activities=kinds, schedule=schedule, on_trace_ready=write
        ) as profile:
            step()
            dist.barrier()
            finish()
            profile.step()
            step()
            finish()
            profile.step()
        return exposure(kernels_of(json.loads(path.read_text())))


def finish() -> None:
    if CUDA:
        torch.cuda.synchronize()


def with_profile(row: Row, step: Callable[[], object], setting: Setting) -> Iterator[Row]:
    """The row, and where it is asked for the profile of its step."""
    yield row
    if setting.profile:
        yield profiled(step).row(row)
