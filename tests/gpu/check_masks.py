"""Masks that are run as structure: right against float64, and as fast as ``flex_attention``.

    python tests/gpu/check_masks.py [--only NAME] [--skip errors rates] [--device cpu]

First relative errors of the output and of the worst gradient, by every kernel that takes a mask as
structure, for three simulated ranks in zigzag: each visits the keys of all, merges, and goes back
with the global output and log-sum-exp. Then milliseconds of forward and backward and the peak
memory, of one attention with 32 heads that share 8 of keys, head dim 128, bfloat16: by Mosaic on
one rank with the mask that a model builds, and by ``torch.nn.attention.flex_attention`` with a
BlockMask that is made before. Exits 1 if a result is wrong or fails. On a CPU sizes are small and
the flex kernels are plain math: right or wrong only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import mosaic
from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.attend import attend, attend_backward
from mosaic.attention.blocks import FULL, Band
from mosaic.attention.kernels.flex import FLEX
from mosaic.attention.kernels.math import MATH
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.strategy import LOCAL
from mosaic.attention.visit import Inputs, visit
from mosaic.layout import Layout
from mosaic.torch_private import FakeStore

CAUSAL = Band(None, 0)
HALF = torch.bfloat16
#: The largest error that rounding explains: this much, or a few times the plain kernel's.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def say(words: str = "") -> None:
    print(words, flush=True)


# --- a mask on simulated ranks --------------------------------------------------------------------


def by_ranks(
    tensors: list[Tensor], inputs: Inputs, band: Band, scale: float, tile: str = "", ranks: int = 3
) -> list[Tensor]:
    """out, dq, dk and dv for q, k, v and dout of what ranks do, one after the other."""
    q, k, v, dout = tensors
    layouts = [Layout.zigzag(x.shape[2], ranks) for x in (q, k)]
    queries, keys = ([list(layout.indices(r)) for r in range(ranks)] for layout in layouts)
    out, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (dout, q, k, v))
    for rank, at in enumerate(queries):
        plan = AttentionPlan(LOCAL, rank, "", *layouts, band, scale, tile=tile)
        mask = inputs.mask
        has_rows = mask is not None and mask.shape[2] > 1
        here = inputs._replace(mask=mask[:, :, at] if has_rows else mask)
        mine, dmine, known = q[:, :, at], dout[:, :, at], None
        rows = layouts[0].ranks[rank]
        visits = [visit(plan, rows, chunk, mine, here) for chunk in layouts[1].ranks]
        for there, found in zip(keys, visits, strict=True):
            known = attend(mine, k[:, :, there], v[:, :, there], found, known)
        out[:, :, at] = known[0].double()
        for there, found in zip(keys, visits, strict=True):
            block = (mine, k[:, :, there], v[:, :, there], *known)
            grads = attend_backward(dmine, *block, found, False)
            dq[:, :, at] += grads[0]
            dk[:, :, there] += grads[1]
            dv[:, :, there] += grads[2]
    return [out, dq, dk, dv]


@dataclass(frozen=True)
class Check:
    """One line of the table of errors."""

    name: str
    band: Band = FULL
    mask: str = ""
    documents: bool = False
    dim: int = 64
    v_dim: int = 64
    kv_heads: int = 2
    dtype: torch.dtype = HALF
    tokens: int = 900


CHECKS = (
    Check("documents, causal", CAUSAL, documents=True),
    Check("documents, window", Band(99, 0), documents=True),
    Check("documents in no order", CAUSAL, "shuffled", True),
    Check("padding", mask="padding"),
    Check("padding, documents", CAUSAL, "padding", True),
    Check("padding of heads", CAUSAL, "heads", kv_heads=4),
    Check("prefix, documents", FULL, "prefix", True),
    Check("distances", mask="distances"),
    Check("padding, 120 tokens", mask="padding", tokens=120),
    Check("no key", mask="nothing"),
    Check("no key, documents", CAUSAL, "nothing", True),
    Check("3 tokens", CAUSAL, "padding", True, tokens=3),
    *(
        Check(f"head dim {n}", CAUSAL, "", True, n, n)
        for n in (16, 32, 48, 72, 80, 96, 120, 128, 256)
    ),
    Check("head dim 64, v 128", CAUSAL, "", True, 64, 128),
    Check("float16", CAUSAL, "padding", True, dtype=torch.float16),
    Check("float32, head dim 128", CAUSAL, "padding", True, 128, 128, dtype=torch.float32),
)
#: The kernels that take a mask as structure.
STRUCTURED = ("short", "short float32", "flash_attn 4, seen keys", "flash_attn 4, masks", "flex")
#: Boolean programs as ``analyze_masks`` reads them: of positions of queries and keys, and lengths.
TILES = {
    "prefix": "bool: le.Tensor(%1, %0); lt.Tensor(%1, %2); bitwise_or.Tensor(%3, %4)",
    "distances": "bool: sub.Tensor(%1, %0); remainder.Scalar(%3, 3); eq.Scalar(%4, 0); "
    "lt.Tensor(%1, %2); logical_and(%5, %6)",
}


def inputs_of(check: Check, device: torch.device) -> Inputs:
    """With rows that see nothing, and a batch that differs from the other."""
    n = check.tokens
    at = torch.arange(n, device=device)
    ids = None
    if check.documents:
        ids = torch.stack([at // (n // 5 + 1) * 7 - 2**62, (at + 40) ** 2 // (n * n // 3 + 1)])
        ids = ids.flip(1)[:, torch.randperm(n, device=device)] if check.mask == "shuffled" else ids
    lengths = torch.tensor([n // 3, n - n // 9], device=device).view(2, 1, 1, 1)
    mask = at < lengths if check.mask in ("padding", "heads") else None
    if check.mask == "nothing":
        mask = (at < lengths) & (lengths > n // 2)
    if check.mask == "heads":
        mask = mask & (at % torch.arange(2, 6, device=device).view(1, 4, 1, 1) > 0)
    leaves = ()
    if check.mask in TILES:
        leaves = (at.view(1, 1, n, 1), at.view(1, 1, 1, n), lengths)
    return Inputs(mask, ids, ids, None, leaves)


def tensors_of(check: Check, device: torch.device) -> list[Tensor]:
    """q, k, v, dout: (2, heads, tokens, dim)."""
    torch.manual_seed(0)
    sizes = ((4, check.dim), (check.kv_heads, check.dim), (check.kv_heads, check.v_dim))
    shapes = [(2, heads, check.tokens, dim) for heads, dim in (*sizes, (4, check.v_dim))]
    return [torch.randn(shape, device=device).to(check.dtype) for shape in shapes]


def dense(check: Check, inputs: Inputs, device: torch.device) -> Tensor:
    """(2, 4, tokens, tokens): which keys a query sees, written out."""
    n = check.tokens
    at = torch.arange(n, device=device)
    ahead = at - at[:, None]
    left, right = (n if x is None else x for x in check.band)
    seen = ((ahead >= -left) & (ahead <= right)).expand(2, 4, n, n)
    if inputs.query_documents is not None:
        ids = inputs.query_documents
        seen = seen & (ids[:, None, :, None] == ids[:, None, None])
    if inputs.mask is not None:
        seen = seen & inputs.mask
    if check.mask == "prefix":
        seen = seen & ((ahead <= 0) | (at < inputs.leaves[2]))
    if check.mask == "distances":
        seen = seen & (ahead % 3 == 0) & (at < inputs.leaves[2])
    return seen


def plain(tensors: list[Tensor], seen: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk and dv; a row that sees nothing has out 0."""
    q, k, v, dout = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    blind = ~seen.any(-1, keepdim=True)
    out = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, dout))]


def relative(x: Tensor, y: Tensor) -> float:
    """The distance, relative to the norm, or to 1 where that is less."""
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1))


def errors(found: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Of the output, and of the worst gradient."""
    apart = [relative(x, y) for x, y in zip(found, want, strict=True)]
    return apart[0], max(apart[1:]) if all(e == e for e in apart) else float("nan")


def checked(check: Check, device: torch.device) -> tuple[str, str]:
    """A line of the table, and what is wrong."""
    if device.type == "cpu":
        check = replace(check, tokens=min(check.tokens, 300))
        use_flex_on_cpu()
    inputs, tensors = inputs_of(check, device), tensors_of(check, device)
    seen = dense(check, inputs, device)
    want = plain(tensors, seen, torch.float64)
    base = errors(plain(tensors, seen, check.dtype), want)
    allowed = [max(ROUNDING[check.dtype], 4 * e) for e in base]
    cells, wrong = [f"{base[0]:.1e} {base[1]:.1e}"], []
    for name in STRUCTURED:
        text, problem = cell(check, name, inputs, tensors, want, allowed)
        cells.append(text)
        wrong += [problem] if problem else []
    return f"{check.name:32}{''.join(f'{text:26}' for text in cells)}", "; ".join(wrong)


def cell(
    check: Check,
    name: str,
    inputs: Inputs,
    tensors: list[Tensor],
    want: list[Tensor],
    allowed: list[float],
) -> tuple[str, str]:
    """What to print of a kernel, and what is wrong."""
    try:
        with kernels.using(name):
            scale, tile = check.dim**-0.5, TILES.get(check.mask, "")
            found = errors(by_ranks(tensors, inputs, check.band, scale, tile), want)
    except UnsupportedError:
        return "-", ""
    except Exception as error:  # one that fails must not stop the rest
        first = (str(error).splitlines() or [""])[0]
        return "fails", f"{check.name}, {name}: {type(error).__name__}: {first}"
    text = f"{found[0]:.1e} {found[1]:.1e}"
    if all(error <= most for error, most in zip(found, allowed, strict=True)):
        return text, ""
    return text + "!", f"{check.name}, {name}: errors {text}, allowed {allowed}"


def check_errors(device: torch.device, only: str) -> list[str]:
    """What is wrong. On a GPU processes share the checks: nearly all of the time is compilation."""
    names = "".join(f"{name:26}" for name in ("plain math", *STRUCTURED))
    say(f"{'relative errors: out, gradients':32}{names}on 3 ranks")
    wrong = []
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        run = pool.map if device.type == "cuda" else map
        checks = [check for check in CHECKS if check.name.startswith(only)]
        for line, problem in run(partial(checked, device=device), checks):
            say(line)
            wrong += [problem] if problem else []
    return wrong


def use_flex_on_cpu() -> None:
    """As if flex did all structures there."""
    kernels.KERNELS = (FLEX._replace(fits=lambda case: case.is_structured), MATH)


# --- time and memory ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """One line of the table of times. ``mask``: as a model builds it; ``mod``: as flex has it."""

    name: str
    tokens: int
    seen: float  # of all pairs
    mask: Callable[[int, Tensor], Tensor] | None
    mod: Callable[[Tensor], Callable[..., Tensor]]
    data: Callable[[int, torch.device], Tensor] = field(
        default=lambda n, d: torch.arange(n, device=d)
    )


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


WINDOW, DOCUMENTS = 1024, 8


def rates(tokens: int) -> tuple[Rate, ...]:
    return (
        Rate("causal", tokens, 0.5, causal, lambda _: lambda b, h, i, j: j <= i),
        Rate(
            f"causal, {DOCUMENTS} documents",
            tokens,
            0.5 / DOCUMENTS,
            packed,
            lambda ids: lambda b, h, i, j: (j <= i) & (ids[i] == ids[j]),
            lambda n, d: torch.arange(n, device=d) // (n // DOCUMENTS),
        ),
        Rate(
            "padding, a fifth of the keys",
            tokens,
            0.8,
            padded,
            lambda real: lambda b, h, i, j: real[j],
            lambda n, d: torch.arange(n, device=d) < n - n // 5,
        ),
        Rate(
            f"causal, window {WINDOW}",
            2 * tokens,
            WINDOW / (2 * tokens),
            window,
            lambda _: lambda b, h, i, j: (j <= i) & (i - j < WINDOW),
        ),
    )


def by_mosaic(rate: Rate, data: Tensor, inner: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
        mask = rate.mask(q.shape[2], data)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    compiled = torch.compile(attention, backend="mosaic", options={"inner": inner})
    return lambda q, k, v: compiled(q, k, v, data)


def by_flex(rate: Rate, data: Tensor, _: str) -> Callable[..., Tensor]:
    mod, n = rate.mod(data), rate.tokens
    blocks = torch.compile(create_block_mask)(mod, None, None, n, n, device=data.device)
    called = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: called(q, k, v, block_mask=blocks, enable_gqa=True)


def measured(
    called: Callable[..., Tensor], n: int, heads: tuple[int, int], dim: int, device: torch.device
) -> tuple[list[Tensor], str]:
    """What a first run gives; milliseconds forward and backward, peak GiB, seconds of the first."""
    torch.manual_seed(0)
    dtype = HALF if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, h, n, dim, device=device).to(dtype) for h in (*heads, heads[1], heads[0])
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    begin, times = time.perf_counter(), []
    out = called(*leaves)
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
        out = called(*leaves)
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


def show_rates(device: torch.device) -> list[str]:
    is_cuda = device.type == "cuda"
    if not is_cuda:
        use_flex_on_cpu()
    heads, dim, inner = ((32, 8), 128, "inductor") if is_cuda else ((4, 2), 16, "eager")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mosaic.init(sp_size=1, device=device)
    wrong, lines = [], []
    say(f"\n{'':34}{'forward  backward  both, peak memory, first run':>30}")
    for rate in rates(32768 if is_cuda else 128):
        known: list[Tensor] = []
        ways = (("Mosaic", by_mosaic), ("flex_attention", by_flex))
        for name, way in ways if is_cuda else ways[:1]:
            label = f"{rate.name}, {rate.tokens:,}: {name}"
            try:
                called = way(rate, rate.data(rate.tokens, device), inner)
                found, text = measured(called, rate.tokens, heads, dim, device)
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
    parser.add_argument("--only", default="", help="checks whose names begin so")
    parser.add_argument("--skip", nargs="*", default=[], choices=("errors", "rates"))
    given = parser.parse_args()
    device = torch.device(given.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, {where}\n")
    wrong = [] if "errors" in given.skip else check_errors(device, given.only)
    wrong += [] if "rates" in given.skip else show_rates(device)
    say("\n" + "\n".join(wrong or ["all right"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
