"""A whole training step on one GPU: Hugging Face's Llama, compiled by torch and by Mosaic.

    python tests/gpu/bench_step.py [--json FILE] [--only WORDS ...] [--small]

Eight layers (hidden 4,096, 32 heads that share 8 of keys), bfloat16, causal, no logits: one loss of
the last hidden states, forward and backward. 16,384 tokens, and 32,768 with checkpoints. Each line
is a process of its own: milliseconds (median of 8, CUDA events), peak memory, seconds of the first
step less an ordinary one, and what a profile says: GEMMs, attention, and the share of the rest.

``labels``: LlamaForCausalLM with its own loss over 128,256 words; ``sum``: the same model, the sum
of its hidden states (and of its head, which so has a gradient) in place of the loss.

``rank 0 of p`` is one rank's part of p times the tokens, in a fake group: it sends to itself, so
that keys that visit have real values. Its ideal is its GEMMs and one causal attention of the same
number of pairs, n / sqrt(p) tokens, by this device's quickest kernel.

On a CPU (``--small``) the sizes are tiny, and the lines only show that the script runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import mosaic
from mosaic.attention import kernels
from mosaic.attention.blocks import Piece
from mosaic.torch_private import FakeStore

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
INNER = "inductor" if CUDA else "eager"


@dataclass(frozen=True)
class Size:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    layers: int = 8


SMALL = Size(64, 4, 2, 128, 2)


@dataclass(frozen=True)
class Way:
    """A line of the table. ``ranks``: 0 is no Mosaic; ``tokens``: of this rank."""

    name: str
    tokens: int
    attention: str = "sdpa"
    checkpoint: bool = False
    ranks: int = 0
    loss: str = ""


WORDS = 128_256
WAYS = (
    Way("torch.compile, SDPA", 16_384),
    Way("torch.compile, flex", 16_384, "flex_attention"),
    Way("Mosaic, p = 1", 16_384, ranks=1),
    Way("torch.compile, SDPA", 32_768, checkpoint=True),
    Way("torch.compile, flex", 32_768, "flex_attention", checkpoint=True),
    Way("Mosaic, p = 1", 32_768, checkpoint=True, ranks=1),
    Way("Mosaic, rank 0 of 8", 16_384, ranks=8),
    Way("Mosaic, rank 0 of 64", 4096, ranks=64),
    Way("torch.compile, labels", 16_384, loss="labels"),
    Way("Mosaic, p = 1, sum", 16_384, ranks=1, loss="sum"),
    Way("Mosaic, p = 1, labels", 16_384, ranks=1, loss="labels"),
)


def built(way: Way, size: Size) -> Callable[[], Tensor]:
    """One forward, up to the loss."""
    torch.manual_seed(0)
    whole = way.tokens * max(way.ranks, 1)
    sizes: dict[str, Any] = dict(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=WORDS if way.loss and size != SMALL else 128,
        max_position_embeddings=whole,
        use_cache=False,
        attn_implementation=way.attention,
    )
    with DEVICE:
        kind = LlamaForCausalLM if way.loss else LlamaModel
        model: Any = kind(LlamaConfig(**sizes)).train()
        model.to(DTYPE)
        x = torch.randn(1, whole, size.hidden, dtype=DTYPE)
        labels = torch.randint(0, model.config.vocab_size, (1, whole))
    if way.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = model.model if way.loss == "sum" else model
    if way.ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=way.ranks)
        mosaic.init(sp_size=way.ranks, device=DEVICE)
        compiled.compile(backend="mosaic", dynamic=False, options={"inner": INNER})
    else:
        compiled.compile(backend=INNER, dynamic=False)
    if way.ranks > 1:
        x = mosaic.distribute(x, 1, mosaic.Layout.zigzag(whole, way.ranks))

    def forward() -> Tensor:
        model.zero_grad()
        if way.loss == "labels":
            return model(inputs_embeds=x, labels=labels).loss
        if way.loss == "sum":
            hidden = model.model(inputs_embeds=x).last_hidden_state
            return hidden.float().sum() + model.lm_head.weight.sum()
        return model(inputs_embeds=x).last_hidden_state.float().square().mean()

    return forward


# --- what is measured -----------------------------------------------------------------------------

#: The first that a kernel's name has says what it is.
KINDS = (
    ("attention", "flash|sdpa|fmha|flex|attention"),
    ("GEMM", "gemm|nvjet|cublas|xmma"),
)


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.I)), "rest")


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of kernels by their kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = {"attention": 0.0, "GEMM": 0.0, "rest": 0.0}
    for event in profile.key_averages():
        found[kind_of(event.key)] += event.self_device_time_total / 1000
    return found


def milliseconds(step: Callable[[], None], times: int = 8) -> float:
    taken = []
    for _ in range(times + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return median(taken[1:])


def best_attention(size: Size, tokens: int) -> float:
    """Milliseconds of one causal attention, forward and backward, by the quickest kernel."""
    dim = size.hidden // size.heads
    counts = (size.heads, size.kv_heads, size.kv_heads, size.heads)
    q, k, v, dout = (torch.randn(1, h, tokens, dim, device=DEVICE, dtype=DTYPE) for h in counts)
    given: Any = {"band": (None, 0), "mask": None, "scale": dim**-0.5, "keep": None}

    def step() -> None:
        out, lse = kernels.forward(q, k, v, **given)
        kernels.backward(dout, q, k, v, out, lse, **given)

    able = []
    for kernel in kernels.KERNELS:
        case = kernels.Case.of(q, k, v, None, False)
        if kernel.does(case, Piece(0, tokens, 0, tokens, None, 0)) and kernel.bands != "tile":
            with kernels.using(kernel.name):
                able.append(milliseconds(step, 3))
    return min(able)


def measured(way: Way, size: Size) -> dict[str, Any]:
    forward = built(way, size)

    def step() -> None:
        forward().backward()

    begin = time.perf_counter()
    step()
    if not CUDA:
        return asdict(way)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    step()
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(step)
    peak = torch.cuda.max_memory_allocated() / 2**30
    found = {**asdict(way), "ms": took, "GiB": peak, "compile s": first - took / 1000}
    found.update(profiled(step))
    if way.ranks > 1:
        tokens = round(way.tokens * math.sqrt(way.ranks) / 128) * 128
        found["ideal ms"] = found["GEMM"] + size.layers * best_attention(size, tokens)
    return found


def line(found: dict[str, Any]) -> str:
    name = f"{found['name']:<24}{found['tokens']:>7,}{' ckpt' if found['checkpoint'] else '':<5}"
    if "ms" not in found:
        return f"{name}  ran"
    kinds = [found[kind] for kind in ("GEMM", "attention", "rest")]
    parts = "".join(f"{ms:9.1f}" for ms in kinds)
    text = f"{name}{found['ms']:9.1f} ms{found['GiB']:7.1f} GiB{found['compile s']:7.1f} s{parts}"
    text += f"{kinds[2] / sum(kinds):7.1%}"
    return f"{text}{found['ideal ms'] / found['ms']:7.3f}" if "ideal ms" in found else text


HEAD = (
    f"{'':<36}{'step':>12}{'peak':>11}{'compile':>9}{'GEMM':>9}{'attn':>9}{'rest':>9}{'':>7}  ideal"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file that gets all numbers")
    parser.add_argument("--only", nargs="*", help="the ways with one of these words in their names")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=180, help="that a line may take")
    parser.add_argument("--way", type=int, help="run this one, here")
    given = parser.parse_args()
    if given.way is not None:
        way = WAYS[given.way]
        small = given.small
        found = measured(replace(way, tokens=128) if small else way, SMALL if small else Size())
        print(json.dumps(found))
        return 0
    where = torch.cuda.get_device_name() if CUDA else "cpu"
    print(f"torch {torch.__version__}, {where}\n{HEAD}", flush=True)
    results, failed = [], 0
    for number, way in enumerate(WAYS):
        if given.only and not any(word in way.name for word in given.only):
            continue
        if not CUDA and way.attention == "flex_attention":
            continue  # it has no backward there
        command = [sys.executable, __file__, "--way", str(number)]
        try:
            ran = subprocess.run(
                command + ["--small"] * given.small,
                capture_output=True,
                text=True,
                check=True,
                timeout=given.seconds,
            )
        except subprocess.SubprocessError as error:
            failed += 1
            said = str(getattr(error, "stderr", "") or error)[-600:]
            print(f"{way.name:<24}{way.tokens:>7,}  {said}", flush=True)
            continue
        results.append(json.loads(ran.stdout.splitlines()[-1]))
        print(line(results[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
