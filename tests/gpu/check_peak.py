"""What a rank holds, on one GPU: rank 0 of p under FSDP2, in a fake group, and one process.

    python tests/gpu/check_peak.py --ranks 4

A Llama of 8 blocks in bfloat16, no checkpoints, each block compiled. Prints bytes kept between
forward and backward, parameters, and the peak of a step, of one process and of a rank. Exits 1 if a
rank keeps more than 1.15 / p. The fake group sends nothing: these are bytes, not results.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measure import gibibytes, held_by, kept_for_backward  # noqa: E402
from models.llama import Llama  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import mosaic  # noqa: E402
from mosaic.torch_private import FakeStore  # noqa: E402

SPEC = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "auto"})
VOCAB = 4096  # the logits are no activation of a block


def measured(p: int, n: int, width: int, device: str) -> dict[str, float]:
    """Bytes of the third step; p = 0 is one process without Mosaic."""
    torch.manual_seed(0)
    heads = width // 64
    sizes = {"vocab": VOCAB, "embed": width, "heads": heads, "kv_heads": heads // 4}
    with torch.device(device):
        model: Any = Llama(**sizes, hidden=4 * width, layers=8).bfloat16()
        ids = torch.randint(VOCAB, (1, n))
    if p:
        model = mosaic.parallelize(model, SPEC, fully_shard=True)
        # Cut as causal blocks want them: a fake group would hand out ids that were never sent.
        ids = mosaic.distribute(ids, 1, mosaic.Layout.zigzag(n, p))
    else:
        for block in model.blocks:
            block.compile()

    def forward() -> torch.Tensor:
        return model(ids)[0].float().square().mean()

    for _ in range(2):
        forward().backward()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    own = [w.to_local() if isinstance(w, DTensor) else w for w in model.parameters()]
    loss, kept = kept_for_backward(forward, own)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    parameters = sum(storage.nbytes() for w in own for storage in held_by(w))
    return {"kept for backward": kept, "parameters": parameters, "peak of a step": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=2048)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = measured(0, given.length, given.width, device)
    torch._dynamo.reset()
    gc.collect()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=given.ranks)
    mosaic.init(sp_size=given.ranks, device=device)
    rank = measured(given.ranks, given.length, given.width, device)
    print(f"torch {torch.__version__}, {device}, {given.length:,} tokens, width {given.width}")
    for name, whole in one.items():
        ratio = f"{rank[name] / whole:.3f}" if whole else ""
        print(f"{name:<20}{gibibytes(whole):>12}{gibibytes(rank[name]):>12}  {ratio}", flush=True)
    return int(rank["kept for backward"] > 1.15 / given.ranks * one["kept for backward"])


if __name__ == "__main__":
    sys.exit(main())
