"""``mosaic.parallelize`` under NCCL, against one process; then a Llama's step, its time and memory.

    python tests/gpu/check_parallel.py --gpus 4

Prints a line for each way to train (replicas x ranks, FSDP2, HSDP or none, breaks in blocks,
checkpoints, inner compiler): the largest difference of three steps' weights to one process in
float64. Exits 1 if one is too large. Then seconds and peak memory of a step in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/ranks"), str(ROOT / "examples")]

import parallel_jobs as jobs  # noqa: E402
import torch  # noqa: E402
from models.llama import Llama  # noqa: E402
from rank_pool import RankPool  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: E402

import mosaic  # noqa: E402

#: replicas, way, breaks in blocks, options
WAYS: tuple[tuple[int, str, bool, dict[str, Any]], ...] = (
    (1, "fsdp", False, {}),
    (2, "fsdp", False, {"micro": 2}),
    (2, "hsdp", False, {"micro": 2}),
    (1, "fsdp", True, {}),
    (1, "none", False, {}),
    (1, "fsdp", False, {"checkpoint": True, "inner": "inductor"}),
)


def check(pool: RankPool, gpus: int) -> float:
    worst = 0.0
    for dp, how, breaks, options in WAYS:
        start = time.perf_counter()
        every = pool.run(jobs.trained, gpus // dp, dp, how, breaks, timeout=300, **options)
        # Behind the first run, which forks: a backward on the CPU initializes CUDA, too.
        want = jobs.trained(0, dp, how, breaks, micro=options.get("micro", 1))
        pairs = [(got["weights"][n], w) for got in every for n, w in want["weights"].items()]
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        worst = max(worst, off)
        words = f"{dp} x {gpus // dp}  {how:<5} {'breaks' if breaks else '':<7} {options}"
        print(f"{words:<70} {off:.1e}  {time.perf_counter() - start:.1f} s", flush=True)
    return worst


def step(n: int, layers: int) -> tuple[float, float]:
    """Seconds of a step, and GiB at its peak, of a Llama of 4,096."""
    ranks = mosaic.init(sp_size=None)
    torch.manual_seed(0)
    with ranks.device:
        sizes = {"vocab": 32_000, "embed": 4096, "heads": 32, "kv_heads": 8, "hidden": 14_336}
        model: Any = Llama(**sizes, layers=layers)
        ids = torch.randint(32_000, (1, n))
    model = mosaic.parallelize(
        model,
        mosaic.ShardingSpec(**jobs.SPEC),
        fully_shard={"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        checkpoint=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = [timed(model, optimizer, ids) for _ in range(6)]
    return sorted(seconds[3:])[1], torch.cuda.max_memory_allocated() / 2**30


def timed(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(ids, ids)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="*", default=[32_768, 131_072])
    given = parser.parse_args()
    pool = RankPool(given.gpus, timeout=400, device="cuda")
    worst = check(pool, given.gpus)
    print(f"torch {torch.__version__}, {given.gpus} GPUs: worst {worst:.1e}", flush=True)
    for n in given.lengths:
        seconds, peak = pool.run(step, n, given.layers)[0]
        print(f"{given.layers} layers, {n:,} tokens: {seconds:.2f} s a step, {peak:.1f} GiB")
    return int(worst > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
