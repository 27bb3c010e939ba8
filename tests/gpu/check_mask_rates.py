"""How fast masks and changes of scores are that run as structure, beside ``flex_attention``.

    python tests/gpu/check_mask_rates.py [--only WORDS ...] [--device cpu]

Milliseconds of forward and backward and the peak memory, of one attention in bfloat16, with 32
heads that share 8 of keys, head dim 128 (T5's: 16 heads, head dim 64): by Mosaic on one rank with
the mask that a model builds, and by ``torch.nn.attention.flex_attention`` with a BlockMask that is
made before and a ``score_mod``; sinks there by the log-sum-exp. Exits 1 if a result is wrong or
fails. On a CPU sizes are small and the flex kernels are plain math: right or wrong only.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from check_masks import HALF, relative, say, use_flex_on_cpu
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import mosaic
from mosaic.torch_private import FakeStore


@dataclass(frozen=True)
class Rate:
    """One line of the table of times. ``mask``: as a model builds it; ``mod``: as flex has it."""

    name: str
    tokens: int
    mask: Callable[[int, Tensor], Tensor] | None
    mod: Callable[[Tensor], Callable[..., Tensor]] | None
    data: Callable[[int, torch.device], Tensor] = field(
        default=lambda n, d: torch.arange(n, device=d)
    )
    cap: float = 0.0
    learns: bool = False
    heads: tuple[int, int] = (32, 8)
    dim: int = 128


def causal(n: int, data: Tensor) -> Tensor:
    at = torch.arange(n, device=data.device)
    return at <= at[:, None]


def window(n: int, data: Tensor) -> Tensor:
    at = torch.arange(n, device=data.device)
    return (at <= at[:, None]) & (at[:, None] - at < WINDOW)


def packed(n: int, ids: Tensor) -> Tensor:
    return causal(n, ids) & (ids[:, None] == ids)


def padded(n: int, real: Tensor) -> Tensor:
    return real[None].expand(n, n)


def bucket(ahead: Tensor) -> Tensor:
    """T5's, of its encoder: 32, exact up to 8 to either side, then logarithmic up to 128."""
    apart = ahead.abs()
    far = 8 + (torch.log(apart.clamp(min=1).float() / 8) / math.log(16) * 8).long()
    return torch.where(apart < 8, apart, far.clamp(max=15)) + 16 * (ahead > 0)


def by_table(n: int, table: Tensor) -> Tensor:
    at = torch.arange(n, device=table.device)
    return F.embedding(bucket(at - at[:, None]), table).movedim(2, 0)[None]


def table_of(n: int, device: torch.device) -> Tensor:
    heads, dtype = (16, HALF) if device.type == "cuda" else (4, torch.float32)
    return torch.randn(32, heads, device=device).to(dtype).requires_grad_()


def sinks_of(n: int, device: torch.device) -> Tensor:
    heads, dtype = (32, HALF) if device.type == "cuda" else (4, torch.float32)
    return torch.randn(heads, device=device).to(dtype).requires_grad_()


WINDOW, DOCUMENTS = 1024, 8


def rates(tokens: int) -> tuple[Rate, ...]:
    return (
        Rate("causal", tokens, causal, lambda _: lambda b, h, i, j: j <= i),
        Rate(
            f"causal, {DOCUMENTS} documents",
            tokens,
            packed,
            lambda ids: lambda b, h, i, j: (j <= i) & (ids[i] == ids[j]),
            lambda n, d: torch.arange(n, device=d) // (n // DOCUMENTS),
        ),
        Rate(
            "padding, a fifth of the keys",
            tokens,
            padded,
            lambda real: lambda b, h, i, j: real[j],
            lambda n, d: torch.arange(n, device=d) < n - n // 5,
        ),
        Rate(
            f"causal, window {WINDOW}",
            2 * tokens,
            window,
            lambda _: lambda b, h, i, j: (j <= i) & (i - j < WINDOW),
        ),
        Rate(
            "T5 bias, 16 heads",
            tokens // 4,
            by_table,
            None,
            table_of,
            learns=True,
            heads=(16, 16),
            dim=64,
        ),
        Rate("causal", tokens // 2, causal, lambda _: lambda b, h, i, j: j <= i),
        Rate(
            "softcap 50, causal", tokens // 2, causal, lambda _: lambda b, h, i, j: j <= i, cap=50.0
        ),
        Rate(
            "sinks, causal",
            tokens // 2,
            causal,
            lambda _: lambda b, h, i, j: j <= i,
            sinks_of,
            learns=True,
        ),
    )


def by_mosaic(rate: Rate, data: Tensor, inner: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
        mask = rate.mask(q.shape[2], data)
        if rate.cap or rate.data is sinks_of:  # as transformers writes Gemma 2 and gpt-oss
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = (scores / rate.cap).tanh() * rate.cap if rate.cap else scores
            scores = scores + torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
            if rate.cap:
                return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
            sinks = data.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
            scores = torch.cat([scores, sinks], -1)
            scores = scores - scores.max(-1, keepdim=True).values
            return scores.softmax(-1, dtype=scores.dtype)[..., :-1] @ v
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    compiled = torch.compile(attention, backend="mosaic", options={"inner": inner})
    return lambda q, k, v: compiled(q, k, v, data)


def by_flex(rate: Rate, data: Tensor, _: str) -> Callable[..., Tensor]:
    n, blocks = rate.tokens, None
    if rate.mod is not None:
        # (Compiled for 16,384 tokens, torch 2.11 had not made its kernel after minutes.)
        make = create_block_mask if n <= 32768 else torch.compile(create_block_mask)
        mod = rate.mod(data)
        blocks = make(mod, None, None, n, n, device=data.device)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (
            score + data[bucket(j - i), h]
            if rate.mask is by_table
            else rate.cap * (score / rate.cap).tanh()
        )

    options = {"score_mod": change} if rate.cap or rate.mask is by_table else {}
    called = torch.compile(flex_attention, dynamic=False)
    if rate.data is sinks_of:

        def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = called(q, k, v, block_mask=blocks, enable_gqa=True, return_lse=True)
            return (out * (lse - data.float()[:, None]).sigmoid()[..., None]).to(q.dtype)

        return with_sinks
    return lambda q, k, v: called(q, k, v, block_mask=blocks, enable_gqa=True, **options)


def measured(
    rate: Rate, called: Callable[..., Tensor], learned: list[Tensor], device: torch.device
) -> tuple[list[Tensor], str]:
    """What a first run gives; milliseconds forward and backward, peak GiB, seconds of the first."""
    torch.manual_seed(0)
    n, heads, dim = rate.tokens, rate.heads, rate.dim
    dtype = HALF if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, h, n, dim, device=device).to(dtype) for h in (*heads, heads[1], heads[0])
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    leaves = [*inputs, *learned]
    begin, times = time.perf_counter(), []
    out = called(*inputs)
    found = [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout))]
    del out
    if device.type == "cpu":
        return found, "right or wrong only"
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for i in range(9):
        if i == 1:
            torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = called(*inputs)
        marks[1].record()
        torch.autograd.grad(out, leaves, dout)
        marks[2].record()
        torch.cuda.synchronize()
        del out
        times += [[a.elapsed_time(b) for a, b in pairwise(marks)]] if i else []
    peak = torch.cuda.max_memory_allocated() / 2**30
    forward, backward = (median(column) for column in zip(*times, strict=True))
    took = f"{forward:8.2f} {backward:8.2f} {forward + backward:8.2f} ms"
    return found, f"{took} {peak:7.2f} GiB   first {first:5.1f} s"


def show_rates(device: torch.device, only: list[str] | None) -> list[str]:
    is_cuda = device.type == "cuda"
    if not is_cuda:
        use_flex_on_cpu()
    inner = "inductor" if is_cuda else "eager"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mosaic.init(sp_size=1, device=device)
    wrong, lines = [], []
    say(f"\n{'':34}{'forward  backward  both, peak memory, first run':>30}")
    for rate in rates(32768 if is_cuda else 128):
        if only and not any(word in f"{rate.name}, {rate.tokens:,}" for word in only):
            continue
        known: list[Tensor] = []
        if not is_cuda:
            rate = replace(rate, heads=(4, 4) if rate.mask is by_table else (4, 2), dim=16)
        ways = (("Mosaic", by_mosaic), ("flex_attention", by_flex))
        for name, way in ways if is_cuda else ways[:1]:
            label = f"{rate.name}, {rate.tokens:,}: {name}"
            try:
                torch.manual_seed(0)
                data = rate.data(rate.tokens, device)
                learned = [data] if rate.learns else []
                found, text = measured(rate, way(rate, data, inner), learned, device)
                apart = [relative(x, y) for x, y in zip(found, known, strict=False)]
                known = found
                if any(not e < 2e-2 for e in apart):
                    wrong.append(f"{label}: results are apart by {apart}")
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                text = f"{type(error).__name__}: {first}"
                wrong.append(f"{label}: {text}")
            lines.append(f"{label:58}{text}")
            say(lines[-1])
            torch._dynamo.reset()
            if is_cuda:
                torch.cuda.empty_cache()
    say("\n" + "\n".join(lines))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="*", help="the rates with one of these words in their names or sizes"
    )
    given = parser.parse_args()
    device = torch.device(given.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, {where}")
    wrong = show_rates(device, given.only)
    say("\n" + "\n".join(wrong or ["all right"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
