"""``python tests/costs``: what planning and lowering cost on this machine; ``--quick`` without the
models of 80 layers and without Inductor."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from costs.decoder import Decoder, explained

import mosaic
from mosaic.frontend.explain import Ranks, ranks


def timed(layers: int, p: int, method: str = "auto", *, named: bool = True) -> None:
    start = time.monotonic()
    plan = explained(layers, p, method, named=named)
    seconds = time.monotonic() - start
    nodes = [len(plan.graphs[kind].nodes) for kind in ("forward", "backward")]
    print(
        f"{layers:>7} {p:>6} {method:<11} {'yes' if named else 'no':<6} {seconds:>8.1f} "
        f"{plan.seconds:>7.1f} {nodes[0]:>8} {nodes[1]:>9}",
        flush=True,
    )


def beside_inductor(layers: int) -> None:
    """Forward and backward of one step are compiled; the ranks are pretended."""
    torch._dynamo.reset()
    with ranks(Ranks(4), rank=1), mosaic.plans() as plans:
        start = time.monotonic()
        compiled = torch.compile(Decoder(layers), backend="mosaic", dynamic=False)
        compiled(torch.zeros(1, 512, dtype=torch.long)).sum().backward()
        whole = time.monotonic() - start
    (plan,) = plans
    print(
        f"\n{layers} layers with Inductor: {whole:.0f} s, our passes {plan.seconds:.1f} s "
        f"({plan.seconds / whole:.1%})"
    )


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    print(" layers  ranks method      named   explain  passes  forward  backward")
    print("                                         s       s    nodes     nodes")
    for p in (8, 64, 256, 1024):
        for method in ("ring", "all_gather"):
            timed(2, p, method)
    for layers in (8, 16, 32) if quick else (8, 16, 32, 80):
        timed(layers, 8)
        timed(layers, 8, named=False)
    if not quick:
        beside_inductor(32)
