"""Every attention method on real GPUs: is it right, and how fast is it.

    torchrun --nproc-per-node 2 tests/gpu/check_methods.py [--tokens 32768 131072]

First the relative error in bfloat16 of output and gradients, as a multiple of that of one-GPU
``scaled_dot_product_attention``, both against float64; 1.5 is the most that is right. Then times:
causal, compiled, beside torch's context_parallel and beside one GPU at equal work (n / sqrt(p)
tokens). Last where the time of one method goes. Exits 1 if something is wrong.
On CPUs (gloo) it checks the methods at small sizes in float32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_context_parallel as theirs
from torch import Tensor

import mosaic
from mosaic.api.methods import AllGather, Hierarchical, Mesh2D, Method, Ring, Ulysses, key_of
from mosaic.attention import kernels
from mosaic.attention.blocks import CAUSAL, FULL, Band
from mosaic.layout import Layout

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
CHECKED = 4096 if CUDA else 64
MASKS = {"full": FULL, "causal": CAUSAL, "window": Band(CHECKED // 8 - 1, 0), "padding": FULL}


@dataclass(frozen=True)
class Size:
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Whole q, k, v and dout, the same on every rank."""
        torch.manual_seed(0)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        make = (torch.randn(1, h, self.tokens, self.dim, device=device) for h in counts)
        return tuple(x.to(DTYPE) for x in make)

    def flops(self, causal: bool) -> float:
        return 4 * self.heads * self.tokens**2 * self.dim * (0.5 if causal else 1)


def methods_for(p: int) -> list[Method]:
    found: list[Method] = [AllGather(), Ring(stages=p), Ulysses()]
    found += [Ring(stages=2)] if p > 2 else []
    found += [Mesh2D(2, p // 2), Hierarchical(2, "local")] if p >= 4 else [Mesh2D(1, p)]
    return found


def layout_for(band: Band, n: int, p: int) -> Layout:
    return Layout.zigzag(n, p) if band == CAUSAL else Layout.even(n, p)


def compiled(
    method: Method,
    size: Size,
    band: Band,
    context: mosaic.MosaicContext,
    inner: str = "inductor" if CUDA else "eager",
) -> Callable:
    """The method as a compiled function of local q, k, v and a mask of all keys."""
    layout = layout_for(band, size.tokens, context.size("sp"))
    name = key_of(method)  # torch 2.11 wants a string
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return mosaic.attention(q, k, v, name, window=tuple(band), mask=mask, layout=layout)

    options = {"inner": inner}
    return torch.compile(run, backend="mosaic", options=options, fullgraph=True, dynamic=False)


def mine(x: Tensor, layout: Layout, rank: int) -> Tensor:
    return torch.cat([x[:, :, a:b] for a, b in layout.ranks[rank]], 2)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


# --- right? ---------------------------------------------------------------------------------------


def mask_of(name: str, n: int, device: torch.device) -> Tensor | None:
    return (
        (torch.arange(n, device=device) < n - n // 5).view(1, 1, 1, n)
        if name == "padding"
        else None
    )


def plain(name: str, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one-GPU attention, in ``dtype``."""
    q, k, v = leaves(*(x.to(dtype) for x in tensors[:3]))
    n, band = q.shape[2], MASKS[name]
    mask = mask_of(name, n, q.device)
    if name == "window":
        ahead = torch.arange(n, device=q.device) - torch.arange(n, device=q.device)[:, None]
        mask = ((ahead <= band.right) & (ahead >= -band.left))[None, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=name == "causal", enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))]


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of output and gradients, over all ranks."""
    sums = torch.stack(
        [torch.stack([(a - b).double().square().sum(), b.double().square().sum()])
         for a, b in zip(got, want, strict=True)]
    )  # fmt: skip
    dist.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1]).sqrt().max().item()


def check(context: mosaic.MosaicContext, **inner: str) -> float:
    """The largest error of all methods and masks, in plain's."""
    size, p, rank = Size(CHECKED, 8, 2, 128 if CUDA else 16), context.size("sp"), context.rank("sp")
    tensors, worst = size.tensors(context.device), 0.0
    say(f"\n{'method':<34}" + "".join(f"{name:>12}" for name in MASKS) + "   x plain's error")
    whole = {name: plain(name, tensors, torch.float64) for name in MASKS}
    base = {name: relative(plain(name, tensors, DTYPE), whole[name]) for name in MASKS}
    for method in methods_for(p):
        cells = []
        for name, band in MASKS.items():
            layout = layout_for(band, size.tokens, p)
            q, k, v, dout = (mine(x, layout, rank) for x in tensors)
            q, k, v = leaves(q, k, v)
            mask = mask_of(name, size.tokens, context.device)
            out = compiled(method, size, band, context, **inner)(q, k, v, mask)
            got = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
            ratio = relative(got, [mine(x, layout, rank) for x in whole[name]]) / base[name]
            worst = max(worst, ratio)
            cells.append(f"{ratio:12.3f}")
        say(f"{text(method):<34}{''.join(cells)}")
    say(f"{'plain, relative error':<34}" + "".join(f"{base[name]:12.1e}" for name in MASKS))
    return worst


# --- fast? ----------------------------------------------------------------------------------------


def milliseconds(fn: Callable[[], object], times: int = 10) -> float:
    """The median over ``times`` runs; all ranks start together."""
    for _ in range(3):
        fn()
    took = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end))
    slowest = torch.tensor(median(took), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measured(fn: Callable, tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Forward, and forward with backward, in milliseconds."""
    q, k, v, dout = tensors
    with torch.no_grad():
        forward = milliseconds(lambda: fn(q, k, v))
    q, k, v = leaves(q, k, v)
    return forward, milliseconds(lambda: torch.autograd.grad(fn(q, k, v), (q, k, v), dout))


def line(name: str, times: tuple[float, float], flops: float) -> None:
    forward, both = times
    rate = [
        flops * factor / ms / 1e9
        for factor, ms in ((1, forward), (2.5, both - forward), (3.5, both))
    ]
    say(f"{name:<34}{forward:9.2f} ms {both:9.2f} ms" + "".join(f"{r:9.0f}" for r in rate))


def speed(tokens: int, context: mosaic.MosaicContext) -> None:
    size, p, rank = Size(tokens, 32, 8, 128), context.size("sp"), context.rank("sp")
    layout = layout_for(CAUSAL, tokens, p)
    parts = [mine(x, layout, rank) for x in size.tensors(context.device)]
    say(f"\n{tokens} tokens, causal, 32/8 heads, head dim 128, bf16, {p} GPUs")
    say(f"{'':<34}{'forward':>12} {'+ backward':>12}   fwd / bwd / both, TFLOP/s per GPU")
    less = Size(int(tokens / math.sqrt(p)) // 256 * 256, 32, 8, 128)
    line(
        "one GPU, equal work",
        measured(one_gpu, list(less.tensors(context.device))),
        less.flops(True),
    )
    for method in methods_for(p):
        guarded(text(method), lambda m=method: measured(compiled(m, size, CAUSAL, context), parts),
                size.flops(True) / p)  # fmt: skip
    if p > 1:
        guarded(
            "torch context_parallel, cuDNN", lambda: torchs(size, context), size.flops(True) / p
        )


def guarded(name: str, times: Callable[[], tuple[float, float]], flops: float) -> None:
    try:
        line(name, times(), flops)
    except Exception as error:
        say(f"{name:<34}{type(error).__name__}: {str(error).splitlines()[0][:90]}")
    torch.cuda.empty_cache()


class _OneGpu(torch.autograd.Function):
    """The kernel of the table, without anything around it."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = kernels.forward(q, k, v, **_OneGpu.options(q))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q = ctx.saved_tensors[0]
        return kernels.backward(dout, *ctx.saved_tensors, **_OneGpu.options(q))[:3]

    @staticmethod
    def options(q: Tensor) -> dict:
        scale = 1 / math.sqrt(q.shape[-1])
        return {"band": (None, 0), "mask": None, "scale": scale, "keep": None}


def one_gpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _OneGpu.apply(q, k, v)


def torchs(size: Size, context: mosaic.MosaicContext) -> tuple[float, float]:
    """torch.distributed's context_parallel, in the same process group."""
    assert context.mesh is not None
    mode, mesh = theirs.Mode("cuDNN", "allgather"), context.mesh["sp"]
    return theirs.sdpa(size.tensors(context.device), mode, mesh, measured)


def profile(tokens: int, context: mosaic.MosaicContext) -> None:
    """Where the time of one forward and backward goes on rank 0."""
    size, p, rank = Size(tokens, 32, 8, 128), context.size("sp"), context.rank("sp")
    method, layout = methods_for(p)[-2], layout_for(CAUSAL, tokens, p)
    q, k, v, dout = (mine(x, layout, rank) for x in size.tensors(context.device))
    fn, (q, k, v) = compiled(method, size, CAUSAL, context), leaves(q, k, v)
    for _ in range(3):
        torch.autograd.grad(fn(q, k, v), (q, k, v), dout)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        torch.autograd.grad(fn(q, k, v), (q, k, v), dout)
        torch.cuda.synchronize()
    say(f"\n{text(method)}, {tokens} tokens: time on rank 0's GPU by kernel")
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:10]
    for event in events:
        say(f"{event.self_device_time_total / 1e3:9.2f} ms  x{event.count:<4} {event.key[:90]}")


def text(method: Method) -> str:
    return (
        repr(method)
        .replace("mesh='sp', ", "")
        .replace(", grad_dtype=None", "")
        .replace("mesh='sp'", "")
    )


def say(words: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(words, flush=True)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tokens", type=int, nargs="*", default=[32768, 131072])
    tokens = arguments.parse_args().tokens
    context = mosaic.init(sp_size=None)
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    say(f"torch {torch.__version__}, {context.size('sp')} x {device}")
    right = check(context) <= 1.5
    if CUDA:
        for n in tokens:
            speed(n, context)
        profile(tokens[0], context)
    say("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
