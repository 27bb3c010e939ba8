"""A learned bias by distance, in the way of T5, on real GPUs: its gradient, time and memory.

    torchrun --nproc-per-node 2 tests/gpu/check_bias.py [--tokens 8192]

One process builds the bias for every pair of tokens; Mosaic makes it tile by tile. Prints the time
of a step and the largest memory of each, and how far their gradients are apart, relative to their
norms. Exits 1 if that is more than bfloat16 rounds. On CPUs (gloo) it checks a small size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mosaic

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32


class Relative(nn.Module):
    """Attention with a table of biases: a row for each logarithm of a distance, forth and back."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(32, heads)
        self.qkv, self.out = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        ahead = positions - positions[:, None]
        bucket = (ahead.abs() + 1).float().log2().long().clamp(max=15) + 16 * (ahead > 0)
        bias = self.table(bucket).permute(2, 0, 1)
        heads = self.table.embedding_dim
        q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.out(y.transpose(1, 2).flatten(-2)).float().square().mean()


def measured(step: Callable[[], None], repeats: int = 3) -> str:
    """Milliseconds of a step after two others, and the most memory that it takes."""
    for _ in range(2):
        step()
    if not CUDA:
        return "right or wrong only"
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    return f"{1e3 * seconds:8.1f} ms {torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if CUDA else 64)
    tokens = parser.parse_args().tokens
    context = mosaic.init(sp_size=None)
    embed, heads = (1024, 16) if CUDA else (32, 4)
    torch.manual_seed(0)
    model = Relative(embed, heads).to(context.device, DTYPE)
    x = torch.randn(1, tokens, embed, device=context.device, dtype=DTYPE)
    inner = {"inner": "inductor" if CUDA else "eager"}
    rows = {
        f"Mosaic, {context.size()} ranks": torch.compile(model, backend="mosaic", options=inner),
        "torch.compile, 1 rank": torch.compile(model) if CUDA else model,
    }
    found = []
    for name, called in rows.items():

        def step(called: Callable[[Tensor], Tensor] = called) -> None:
            model.zero_grad()
            called(x).backward()

        text = measured(step)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        if context.rank() == 0:
            print(f"{name:<24}{tokens:>8} tokens {text}", flush=True)
        model.zero_grad(set_to_none=True)
        dist.barrier()
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    if context.rank() == 0:
        print(f"gradients apart: {apart:.1e}")
    context.shutdown()
    return int(apart > (1e-2 if CUDA else 1e-5))


if __name__ == "__main__":
    sys.exit(main())
