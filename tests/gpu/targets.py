"""What is asked of 4 or 8 H100 or H200 by the numbers that ``bench_ranks.py`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import rank_right
import rank_table
import rank_whole
from case_runner import Row
from rank_attention import ONE_GPU, Attention
from rank_faults import SAID

#: Of causal attention: the share of one GPU's rate, and how many times as long torch's best takes.
CAUSAL = {16_384: (0.80, 1.7), 32_768: (0.90, 1.33), 65_536: (0.94, 1.2), 131_072: (0.96, 1.17)}
MASKED, OF_IDEAL, BESIDE_BEST, PREDICTED = 0.90, 0.95, 1.05, (0.8, 1.2)
#: Of the whole 8B model on 8 GPUs: seconds of a step, and tokens a second of one GPU.
LONG, SHORT = (1_048_576, 380.0), (131_072, 1071.0)
#: Of tables: seconds in float32 on 4, memory in parts of one rank's, rate in parts of the kernel's.
TABLE, PART, OF_KERNEL = 4.5, 0.27, 0.90


@dataclass(frozen=True)
class Target:
    what: str
    reached: float
    least: float = -float("inf")
    most: float = float("inf")

    @property
    def is_missed(self) -> bool:
        return not self.least <= self.reached <= self.most  # nor is nan enough

    def __str__(self) -> str:
        bounds = ((">=", self.least), ("<=", self.most))
        asked = " and ".join(f"{sign} {x:g}" for sign, x in bounds if abs(x) != float("inf"))
        return f"{self.what}: {self.reached:.4g}, asked for {asked}"


def targets(rows: Sequence[Row], p: int) -> Iterator[Target]:
    """Of what was measured."""
    for case in dict.fromkeys(row.case for row in rows if "both ms" in row.numbers):
        yield from of_attention(case, [row for row in rows if row.case == case])
    for row in rows:
        if "of ideal" in row.numbers:
            yield Target(f"{row.case}, of the ideal", row.numbers["of ideal"], OF_IDEAL)
        if "x plain's error" in row.numbers:
            error = row.numbers["x plain's error"]
            yield Target(f"{row.case}, errors", error, most=rank_right.ASKED)
        if "said after s" in row.numbers:
            yield Target(f"{row.case}, said after", row.numbers["said after s"], most=SAID)
    yield from of_the_whole_model(rows, p)
    yield from of_tables(rows, p)


def of_attention(case: str, rows: Sequence[Row]) -> Iterator[Target]:
    took = {row.way: row.numbers["both ms"] for row in rows if "both ms" in row.numbers}
    theirs = [ms for way, ms in took.items() if "torch" in way]
    ours = [ms for way, ms in took.items() if "torch" not in way and ONE_GPU not in way]
    share, times = {str(Attention(n)): asked for n, asked in CAUSAL.items()}.get(case, (MASKED, 0))
    for row in rows:
        if not row.way.startswith("auto") or "both ms" not in row.numbers:
            continue
        ms = row.numbers["both ms"]
        if "share" in row.numbers:
            yield Target(f"{case}, auto's share of one GPU", row.numbers["share"], share)
        if theirs and times:
            yield Target(f"{case}, torch's best in times of auto", min(theirs) / ms, times)
        yield Target(f"{case}, auto in times of the best", ms / min(ours), most=BESIDE_BEST)
        if "predicted ms" in row.numbers:
            ratio = row.numbers["predicted ms"] / ms
            yield Target(f"{case}, auto's predicted / measured", ratio, *PREDICTED)


def of_the_whole_model(rows: Sequence[Row], p: int) -> Iterator[Target]:
    found = {row.case: row.numbers for row in rows if "tokens/s/GPU" in row.numbers}
    (long, most), (short, least) = LONG, SHORT
    if p == 8 and (numbers := found.get(rank_whole.title(long))):
        yield Target(f"{rank_whole.title(long)}, seconds of a step", numbers["step s"], most=most)
    if p == 8 and (numbers := found.get(rank_whole.title(short))):
        rate = numbers["tokens/s/GPU"]
        yield Target(f"{rank_whole.title(short)}, tokens/s of one GPU", rate, least)


def of_tables(rows: Sequence[Row], p: int) -> Iterator[Target]:
    found = {(row.case, row.way): row.numbers for row in rows if row.case.startswith("table, ")}
    kernel = next((row.numbers for row in rows if row.case == rank_table.KERNEL), None)
    for (case, way), numbers in found.items():
        if way != rank_table.ways(p) or p == 1:
            continue
        alone = found.get((case, rank_table.ways(1)))
        if alone and alone["GiB"]:
            part = numbers["GiB"] / alone["GiB"]
            yield Target(f"{case}, memory in parts of one rank's", part, most=PART * 4 / p)
        if p == 4 and case == rank_table.title(rank_table.ROWS, "float32", training=False):
            yield Target(f"{case}, seconds", numbers["s"], most=TABLE)
        if kernel and case == rank_table.title(rank_table.MANY, "bfloat16", training=False):
            rate = numbers["TFLOP/s"] / kernel["TFLOP/s"]
            yield Target(f"{case}, of the kernel's rate", rate, OF_KERNEL)
