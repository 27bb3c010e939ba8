"""Random programs on real GPUs against eager mode, many campaigns of the fuzzer side by side.

    python tests/gpu/check_programs.py --campaigns 16 --minutes 8 --save found

Two GPUs run programs of two ranks; with four, three ranks and a mesh of 2 x 2 as well. A campaign
has a processor's core and a process on a GPU for each rank. What was found before (``found.py``) is
run again, too. Prints the outcomes of each mesh, and the programs that are wrong, or die. Exits 1
if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from fuzz import generate  # noqa: E402
from fuzz.ranks import BAD  # noqa: E402

MESHES = {2: ("2",), 3: ("2", "3"), 4: ("2", "3", "2", "2x2")}
#: Of torch 2.11's own: the gradient of a trace of more rows than columns is wrong; and on CUDA that
#: of an average pool of a transposed tensor, a scatter with equal indices takes one at random,
#: hardswish computes with float32 constants.
NOT_EXACT = r"avg_pool1d|scatter\(|hardswish|torch\.trace"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--campaigns", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--count", type=int, default=100_000, help="programs of each campaign")
    parser.add_argument("--save", type=Path, default=Path("found"))
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    started = [start(i, min(gpus, 4), options) for i in range(options.campaigns)]
    started.append(start(0, min(gpus, 4), options, "--found"))
    for process in started:
        process.wait()
    counts: dict[str, Counter[str]] = {}
    for log in sorted(options.save.glob("log-*.jsonl")):
        for row in map(json.loads, log.read_text().splitlines()):
            counts.setdefault(row["mesh"], Counter())[row["outcome"]] += 1
            if row["outcome"] in BAD:
                print(row["mesh"], row["seed"], row["outcome"], row["detail"][-300:])
    for mesh, outcomes in counts.items():
        print(f"mesh {mesh}: {outcomes.total()} programs, {dict(outcomes)}")
    sys.exit(any(BAD & outcomes.keys() for outcomes in counts.values()))


def start(
    number: int, gpus: int, options: argparse.Namespace, *more: str
) -> subprocess.Popen[bytes]:
    mesh = MESHES[gpus][number % len(MESHES[gpus])]
    cards = [str((number + i) % gpus) for i in range(generate.MESHES[mesh].count)]
    command = [sys.executable, "-m", "fuzz", "--device", "cuda", "--mesh", mesh, "--no-reduce"]
    command += ["--seed", str(options.seed + 100_000 * number), "--count", str(options.count)]
    command += ["--minutes", str(options.minutes), "--save", str(options.save.resolve())]
    command += ["--skip", NOT_EXACT, *more]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(cards), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=TESTS, env=env, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
