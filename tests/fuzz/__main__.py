"""Try random programs on real ranks: ``cd tests && python -m fuzz --mesh 2 --count 100``.

``--seed 7`` begins at that seed, ``--replay program.py`` runs a saved program, ``--show`` prints
the programs. What fails is reduced, and printed (and saved with ``--save folder``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from fuzz.draw import seeded
from fuzz.found import FOUND
from fuzz.generate import MESHES, generate
from fuzz.judge import Verdict, judge
from fuzz.malformed import generate_call, judge_call
from fuzz.program import Program
from fuzz.ranks import BAD, FuzzRanks
from fuzz.reduce import reduced
from rank_pool import RankPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", choices=list(MESHES), default="2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--replay")
    parser.add_argument("--save")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--malformed", action="store_true", help="wrong calls, not programs")
    parser.add_argument("--found", action="store_true", help="the programs of found.py again")
    parser.add_argument("--skip", help="pass over programs whose text matches this pattern")
    parser.add_argument("--no-reduce", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="a GPU per rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cuda":  # asked of the driver's library, CUDA stays unused in this process
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    ranks = FuzzRanks(RankPool(MESHES[options.mesh].count, device=options.device))
    try:
        replay(options, ranks) if options.replay else campaign(options, ranks)
    finally:
        ranks.pool.close()


def replay(options: argparse.Namespace, ranks: FuzzRanks) -> None:
    verdict = ranks.try_out(judge, Path(options.replay).read_text(), options.device)
    print(verdict.outcome, verdict.detail, verdict.gathered, verdict.attentions, sep="\n")


def campaign(options: argparse.Namespace, ranks: FuzzRanks) -> None:
    def tried(source: str) -> Verdict:
        if options.malformed:
            return ranks.try_out(judge_call, source)
        return ranks.try_out(judge, source, options.device)

    counts: Counter[str] = Counter()
    start = time.monotonic()
    log = None
    if options.save:
        Path(options.save).mkdir(parents=True, exist_ok=True)
        log = open(Path(options.save) / f"log-{options.mesh}-{options.seed}.jsonl", "a")
    for seed, program, source in drawn(options):
        if time.monotonic() - start > 60 * options.minutes:
            break
        if options.skip and re.search(options.skip, source):
            continue
        if options.show:
            print(source)
        verdict = tried(source)
        counts[verdict.outcome] += 1
        counts["gathered"] += verdict.outcome == "ok" and bool(verdict.gathered)
        counts["nothing cut"] += verdict.outcome == "ok" and not cuts(verdict.attentions)
        if log:
            row = {"seed": seed, "mesh": options.mesh, **vars(verdict)}
            print(json.dumps(row), file=log, flush=True)
        if verdict.outcome not in BAD:
            continue
        if program is not None and not options.no_reduce:
            program, verdict = reduced(program, verdict, lambda p: tried(p.source))
            source = program.source
        text = f"# seed {seed}, mesh {options.mesh}: {verdict.outcome}\n"
        text += "".join(f"# {line}\n" for line in verdict.detail.splitlines()) + source
        print(f"=== seed {seed} mesh {options.mesh}: {verdict.outcome}\n{text}", flush=True)
        if options.save:
            name = hashlib.sha1(source.encode()).hexdigest()[:8]
            (Path(options.save) / f"{verdict.outcome}-{options.mesh}-{seed}-{name}.py").write_text(
                text
            )
    seconds = time.monotonic() - start
    print(f"mesh {options.mesh}: {dict(counts)} in {seconds:.0f} s", flush=True)


def drawn(options: argparse.Namespace) -> Iterator[tuple[int, Program | None, str]]:
    """A number, the program (None: a wrong call) and its text."""
    if options.found:
        yield from ((i, program, program.source) for i, program in enumerate(FOUND.values()))
        return
    for seed in range(options.seed, options.seed + options.count):
        if options.malformed:
            yield seed, None, generate_call(seeded(seed))
            continue
        torch.set_default_dtype(torch.float64)
        program = generate(seeded(seed), options.mesh)
        torch.set_default_dtype(torch.float32)
        yield seed, program, program.source


def cuts(attentions: tuple[str, ...]) -> bool:
    return any("local" not in text for text in attentions)


if __name__ == "__main__":
    main()
