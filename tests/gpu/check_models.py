"""Every model on real GPUs against one process.

    torchrun --nproc-per-node 2 tests/gpu/check_models.py

Prints a line for each model and inner compiler: the largest difference of the loss and of any
gradient, relative to the largest gradient, and the time of the first call. Exits 1 if one is too
large.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/ranks"), str(ROOT / "examples")]

import cases  # noqa: E402
import torch  # noqa: E402
from model_jobs import gradients, loss_of  # noqa: E402

import mosaic  # noqa: E402

NAMES = ("gpt", "gpt_gather", "llama", "table", "table_few", "vit", "relative")


def run(name: str, device: torch.device, options: dict | None) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(0)
    model, args, kwargs = cases.CASES[name][0]()
    model.to(device)
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    called = torch.compile(model, backend="mosaic", options=options) if options else model
    loss = loss_of(called(*args, **kwargs))
    loss.backward()
    return loss.detach(), gradients(model)


def difference(want: tuple, got: tuple) -> float:
    scale = max(g.norm() for g in want[1].values())
    apart = [(got[1][n] - g).norm() / scale for n, g in want[1].items()]
    return float(max([*apart, (got[0] - want[0]).abs() / want[0].abs()]))


def compared(name: str, inner: str, device: torch.device) -> tuple[float, float]:
    """The largest difference of a model to one process, and seconds of its first call."""
    want, spec = run(name, device, None), cases.CASES[name][1]
    start = time.perf_counter()
    got = run(name, device, {"inner": inner, **({"spec": spec} if spec else {})})
    torch._dynamo.reset()
    return difference(want, got), time.perf_counter() - start


def main() -> int:
    context = mosaic.init(sp_size=None)
    worst = 0.0
    for name in NAMES:
        for inner in ("eager", "inductor"):
            apart, seconds = compared(name, inner, context.device)
            worst = max(worst, apart)
            if context.rank() == 0:
                text = f"{name:<12} {inner:<9} difference {apart:.1e}  first call {seconds:.1f} s"
                print(text, flush=True)
    if context.rank() == 0:
        where = f"{context.size()} ranks on {context.device.type}"
        print(f"torch {torch.__version__}, {where}: worst {worst:.1e}")
    context.shutdown()
    return int(worst > 1e-10)


if __name__ == "__main__":
    sys.exit(main())
