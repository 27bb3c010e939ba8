"""Mosaic on all GPUs of one machine, beside one GPU and beside torch's own context parallel.

    python tests/gpu/bench_ranks.py [--json FILE] [--only WORD ...] [--seconds N] [--small]

It starts a process for each GPU (``--ranks`` says how many; on a CPU 2, with gloo), and prints a
line as soon as it is known. The groups, of which ``--only`` picks those with a word in their names:

``causal``   attention, bf16, 32/8 heads of 128: auto, each method, torch's context_parallel
``masks``    the same with 8 documents, and with a window of 4,096, beside flex
``llama``    8 layers of the 8B model's width, FSDP2, checkpoints, beside torch's own way
``right``    methods against float64, 20 steps of training and models beside one process
``table``    150,000 and a million rows of a model in the way of nanoTabPFN; ``alone``: one GPU's
``faults``   a rank that is killed, late (``--late``), or has another batch or length
``whole``    Llama-3-8B itself at ``--tokens``, and the longest length that trains; if it is named

"share" is a rank's rate in parts of that of one GPU with as many pairs of queries and keys.
"predicted" is the cost by which ``auto`` chooses. A case that fails, or takes too long, is a line,
and the next one runs in fresh processes. Exits 1 if a result is wrong or a case failed, else 2 if a
target (``targets.py``; on CPUs none is looked at) was missed or there was no time for a group.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import rank_attention
import rank_faults
import rank_llama
import rank_right
import rank_table
import rank_whole
import torch
from case_runner import CUDA, NOT_RUN, START, Case, Group, Row, Runner, Setting, serve
from rank_attention import ONE_GPU, Attention
from targets import targets


def groups(p: int, small: bool, late: float, tokens: Sequence[int]) -> list[Group]:
    """In the order of what matters most."""
    lengths = (64, 128) if small else (32_768, 131_072, 16_384, 65_536)
    causal = [Attention(n) for n in lengths]
    window = 16 if small else 4096
    masks = [
        Attention(n, **kind) for n in lengths[:2] for kind in ({"documents": 8}, {"window": window})
    ]
    return [
        Group("causal", attentions(causal, p), p, 150),
        Group("masks", attentions(masks, p), p, 80),
        Group("llama", rank_llama.cases(p), p, 110),
        Group("right", rank_right.cases(p), p, 50),
        Group("table", rank_table.cases(p), p, 50),
        Group("faults", [rank_faults.case(late)] * (p > 1), 0, 90),
        Group("alone", rank_table.cases(1), 1, 20),
        Group(WHOLE, [rank_whole.case(n) for n in tokens], p, 520),
    ]


def attentions(some: Sequence[Attention], p: int) -> list[Case]:
    return [case for x in some for case in rank_attention.cases(x, p)]


#: Of which the length is looked for, and which runs if it is named.
WHOLE = "whole"


def search(runner: Runner, table: Table, tokens: Sequence[int], p: int, until: float) -> None:
    """The longest length of which a step ends: each in fresh processes, while there is time."""
    fits = {n: does for n in tokens if (does := table.fits(n)) is not None}
    multiple = 1024 * p if CUDA else 2 * p
    while n := rank_whole.following(fits, multiple):
        left, needed = until - time.monotonic(), START / 2 + rank_whole.seconds(n, p)
        if CUDA and needed > left:
            words = f"not tried: {n:,} tokens take about {needed:.0f} s, and {left:.0f} are left"
            break
        alone = replace(runner, command=[*runner.command, "--steps=1", "--tokens", str(n)])
        alone.run(Group(WHOLE, [rank_whole.case(n)], p, 0), until)
        does = table.fits(n)
        if does is None:
            words = f"{n:,} tokens ended in another way"
            break
        fits[n] = does
    else:
        words = f"tried: {', '.join(f'{n:,}' for n in sorted(fits))}"
    longest = max((n for n, does in fits.items() if does), default=0)
    table.show(Row("whole Llama, the longest", f"{longest:,} tokens", words=words))


# --- the table ------------------------------------------------------------------------------------


def is_too_large(row: Row) -> bool:
    """Whether the whole model did not fit."""
    return row.case.startswith(WHOLE) and "OutOfMemoryError" in row.words


@dataclass
class Table:
    """Prints rows as they come, with a head where the numbers are others."""

    rows: list[Row] = field(default_factory=list)
    head: tuple[str, ...] = ()

    def show(self, row: Row) -> None:
        if is_too_large(row):
            row = replace(row, right=None)  # that is a result
        alike = [r for r in [*self.rows, row] if r.case == row.case]
        base = next((r for r in alike if ONE_GPU in r.way), None)
        if base and "both ms" in row.numbers:  # rates: sizes of equal work are rounded
            row.numbers["share"] = row.numbers["TFLOP/s"] / base.numbers["TFLOP/s"]
        self.rows.append(row)
        if not {*row.numbers} <= {*self.head}:
            self.head = tuple(row.numbers)
            print(f"\n{'':<76}" + "".join(f"{name:>14}" for name in self.head))
        cells = [f"{row.numbers[n]:,.4g}" if n in row.numbers else "" for n in self.head]
        wrong = "  WRONG" if row.right is False else ""
        line = "".join(f"{x:>14}" for x in cells) + f"  {row.words}{wrong}"
        print(f"{row.case:<36} {row.way:<39}{line}".rstrip(), flush=True)

    def fits(self, tokens: int) -> bool | None:
        """Whether a step of the whole model ended; None where something else went wrong."""
        if any(row.case == rank_whole.title(tokens) for row in self.rows):
            return True
        name = rank_whole.case(tokens).name
        failed = any(row.case == name and is_too_large(row) for row in self.rows)
        return False if failed else None

    def conclusions(self) -> Iterator[str]:
        """Of each attention: the best method, auto beside it, what was predicted, torch's best."""
        rows = [r for r in self.rows if "both ms" in r.numbers and ONE_GPU not in r.way]
        for case in dict.fromkeys(r.case for r in rows):
            took = {r.way: r.numbers["both ms"] for r in rows if r.case == case}
            ours = {way: ms for way, ms in took.items() if "torch" not in way}
            if not ours:
                continue
            best = min(ours, key=ours.__getitem__)
            words = [f"{case}: best {best}, {ours[best]:.2f} ms"]
            words += [f"{ms / ours[best]:.3f} x best: {w}" for w, ms in ours.items() if "auto" in w]
            if torchs := [ms for way, ms in took.items() if "torch" in way]:
                words.append(f"torch's best takes {min(torchs) / ours[best]:.2f} x as long")
            some = [r for r in rows if r.case == case and "predicted ms" in r.numbers]
            pairs = [(r.way, r.numbers["predicted ms"] / took[r.way]) for r in some]
            said = ", ".join(f"{way} {ratio:.2f}" for way, ratio in pairs)
            yield "; ".join([*words, *[f"predicted / measured: {said}"] * bool(said)])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file that gets all rows")
    parser.add_argument("--only", nargs="*", help="groups, or cases, with one of these words")
    parser.add_argument("--seconds", type=float, default=530.0, help="that all may take")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--profile", action="store_true", help="which communication is exposed")
    parser.add_argument("--late", type=float, default=40.0, help="seconds of the late rank")
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths of the whole model")
    parser.add_argument("--steps", type=int, default=2, help="of the whole model, each length")
    parser.add_argument("--group", help="run it here, as one of its ranks")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    return parser.parse_args()


def picked(found: Sequence[Group], words: Sequence[str] | None) -> list[Group]:
    """Groups with a word in their names, and of the others the cases that have one."""
    if not words:
        return [group for group in found if group.name != WHOLE]

    def named(name: str) -> bool:
        return any(word.lower() in name.lower() for word in words)

    kept = []
    for group in found:
        some = [case for case in group.cases if named(group.name) or named(case.name)]
        kept += [replace(group, cases=some)] if some else []
    return kept


def main() -> int:
    given = parsed()
    tokens = given.tokens or rank_whole.lengths(given.ranks, given.small)
    some = picked(groups(given.ranks, given.small, given.late, tokens), given.only)
    if given.group:
        group = next(group for group in some if group.name == given.group)
        told = {"late": given.late, "steps": given.steps, "profile": given.profile}
        return serve(group, given.first, Setting(given.small, given.ranks, **told))
    if not some:
        raise SystemExit(f"no group and no case has one of the words {given.only}")
    if int(os.environ.get("RANK", 0)):
        return 0  # of torchrun: its first process starts the ranks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends the ranks
    where = torch.cuda.get_device_name() if CUDA else "cpu"
    print(f"torch {torch.__version__}, {given.ranks} x {where}, {time.strftime('%Y-%m-%d')}")
    table, begun = Table(), time.monotonic()
    options = [f"--ranks={given.ranks}", f"--late={given.late}", *["--small"] * given.small]
    options += ["--profile"] * given.profile
    options += ["--only", *given.only] if given.only else []
    options += [f"--steps={given.steps}", "--tokens", *map(str, tokens)]
    runner = Runner([sys.executable, __file__, *options], table.show)
    stretch, until = given.seconds / sum(group.seconds for group in some), begun
    for group in some:
        until += stretch * group.seconds  # what those before it have left over is added
        start = time.monotonic()
        runner.run(group, until)
        if group.name == WHOLE:
            search(runner, table, tokens, given.ranks, until)
        end = time.monotonic()
        print(f"  {group.name}: {end - start:.0f} s; {end - begun:.0f} s in all", flush=True)
    concluded = [*table.conclusions()]
    asked = [*targets(table.rows, given.ranks)] if CUDA else []
    missed = [target for target in asked if target.is_missed]
    print("\n" + "\n".join([*concluded, *(f"missed: {target}" for target in missed)]))
    print(f"{len(asked) - len(missed)} of {len(asked)} targets reached")
    if given.json:
        rows = [asdict(row) for row in table.rows]
        told = {"torch": torch.__version__, "device": where, "ranks": given.ranks}
        told |= {"rows": rows, "said": concluded, "targets": [asdict(x) for x in asked]}
        given.json.write_text(json.dumps(told, indent=1))
    if any(row.right is False for row in table.rows):
        return 1
    return 2 if missed or any(row.way == NOT_RUN for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
