"""Every kernel of the table that this machine has: is it right, and how fast is it.

    python tests/gpu/check_kernels.py

First a table of relative errors against float64, forward and backward, beside those of plain
``scaled_dot_product_attention`` in the same dtype. Keys come in two blocks of unequal length, so
that merges and the backward with the global log-sum-exp are checked too. ``-`` is a case that the
kernel does not do. Then the rates at 32k tokens. Exits 1 if a result is wrong or a kernel fails.
On a CPU it checks the CPU's kernels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.attend import attend, attend_backward
from mosaic.attention.blocks import CAUSAL, FULL, Band, pieces
from mosaic.attention.shift import row_shift
from mosaic.attention.visit import Visit
from mosaic.layout import Interval
from mosaic.torch_private import make_fx

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOKENS = 32768 if DEVICE.type == "cuda" else 512


@dataclass(frozen=True)
class Check:
    """One line of the table of errors."""

    name: str
    band: Band = FULL
    dim: int = 64
    v_dim: int = 64
    kv_heads: int = 8
    mask: str = ""
    dtype: torch.dtype = HALF
    tokens: int = 333
    compiled: bool = False


CHECKS = (
    Check("full"),
    Check("causal", CAUSAL),
    Check("causal, 1024", CAUSAL, tokens=1024),
    Check("3 tokens, causal", CAUSAL, tokens=3),
    Check("3 tokens, strictly", Band(None, -1), tokens=3),
    Check("window 50", Band(49, 0)),
    Check("window 50 ... 20", Band(49, 20)),
    Check("GQA", kv_heads=2),
    Check("GQA causal", CAUSAL, kv_heads=2),
    Check("GQA, head dim 80", FULL, 80, 80, kv_heads=2),
    *(
        Check(f"head dim {n} causal", CAUSAL, n, n)
        for n in (16, 20, 24, 48, 72, 80, 96, 112, 128, 192, 256)
    ),
    Check("head dim 64, v 128", CAUSAL, 64, 128),
    Check("head dim 128, v 64", CAUSAL, 128, 64),
    Check("head dim 192, v 128", CAUSAL, 192, 128),
    Check("bool mask", mask="bool"),
    Check("bool mask, GQA window", Band(49, 0), kv_heads=2, mask="bool"),
    Check("padding, causal", CAUSAL, mask="padding"),
    Check("bias", mask="bias"),
    Check("bias, causal GQA", CAUSAL, kv_heads=2, mask="bias"),
    Check("row of finfo.min", mask="least"),
    Check("float16 causal", CAUSAL, dtype=torch.float16),
    Check("float16 bias", mask="bias", dtype=torch.float16),
    Check("float32 causal", CAUSAL, dtype=torch.float32),
    Check("float32 bias", mask="bias", dtype=torch.float32),
    Check("compiled, GQA causal", CAUSAL, 24, 24, 2, compiled=True),
    Check("compiled, bias", mask="bias", compiled=True),
)

#: The largest error that rounding explains: this much, or a few times the plain kernel's.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def inputs(check: Check) -> list[Tensor]:
    """q, k, v, dout: (2, heads, tokens, dim)."""
    torch.manual_seed(0)
    sizes = [(8, check.dim), (check.kv_heads, check.dim), (check.kv_heads, check.v_dim)]
    shapes = [(2, heads, check.tokens, dim) for heads, dim in (*sizes, (8, check.v_dim))]
    return [torch.randn(shape, device=DEVICE).to(check.dtype) for shape in shapes]


def mask_of(check: Check) -> Tensor | None:
    """(2|1, 8|1, tokens|1, tokens), with rows that see nothing."""
    n = check.tokens
    if check.mask == "bool":
        seen = torch.rand(2, 1, n, n, device=DEVICE) > 0.4
        seen[:, :, 3] = False
        seen[:, :, 5, : n // 2] = False
        return seen
    if check.mask == "padding":
        lengths = torch.tensor([n // 3, n], device=DEVICE).view(2, 1, 1, 1)
        return torch.arange(n, device=DEVICE) < lengths
    if not check.mask:
        return None
    bias = torch.randn(1, 8, n, n, device=DEVICE).to(check.dtype)
    if check.mask == "least":
        bias[:, :, 3] = torch.finfo(check.dtype).min
        bias[:, :, 4, : n // 3] = torch.finfo(check.dtype).min
    else:
        bias[:, :, 3, : n // 2] = float("-inf")
    return bias


def scores_bias(check: Check, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The band and the mask as numbers to add, (2|1, 8|1, tokens, tokens)."""
    place = torch.arange(check.tokens, device=DEVICE)
    ahead = place - place[:, None]
    left = -check.tokens if check.band.left is None else -check.band.left
    right = check.tokens if check.band.right is None else check.band.right
    seen = (ahead >= left) & (ahead <= right)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    bias = torch.zeros([], dtype=dtype, device=DEVICE).masked_fill(~seen, float("-inf"))
    return bias if mask is None or mask.dtype == torch.bool else bias + mask.to(dtype)


def plain(check: Check, dtype: torch.dtype, mask: Tensor | None, sdpa: Callable) -> list[Tensor]:
    """out, dq, dk, dv (and dmask) of one call of ``sdpa`` with a dense bias."""
    q, k, v, dout = (x.to(dtype) for x in inputs(check))
    bias = None if mask is None or mask.dtype == torch.bool else mask.to(dtype).clone()
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    together = scores_bias(check, mask if bias is None else bias, dtype)
    repeated = (x.repeat_interleave(8 // check.kv_heads, 1) for x in (k, v))
    out = sdpa(q, *repeated, attn_mask=together)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def exact(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """A row that sees no key has out 0."""
    scores = q @ k.mT / q.shape[-1] ** 0.5 + attn_mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v


def by_kernel(check: Check, mask: Tensor | None) -> list[Tensor]:
    """The same by the kernel in use, in two blocks of keys."""
    q, k, v, dout = inputs(check)
    cut = check.tokens * 3 // 8
    cuts = [(0, cut), (cut, check.tokens)]
    need_dmask = mask is not None and mask.is_floating_point()
    rows = (Interval(0, check.tokens),)
    columns = [slice(*keys) for keys in cuts]

    def run(q, k, v, dout, mask):
        shift = row_shift(mask, check.band, rows) if need_dmask else None
        tiles = [None if mask is None else mask[..., keys] for keys in columns]
        visits = [
            Visit(rows, (Interval(*keys),), check.band, check.dim**-0.5, tile, shift)
            for keys, tile in zip(cuts, tiles, strict=True)
        ]
        partial = None
        for keys, visit in zip(columns, visits, strict=True):
            partial = attend(q, k[:, :, keys], v[:, :, keys], visit, partial)
        parts = []
        for keys, visit in zip(columns, visits, strict=True):
            block = (dout, q, k[:, :, keys], v[:, :, keys], *partial)
            parts.append(attend_backward(*block, visit, need_dmask))
        dq, dk, dv, dmask, _ = zip(*parts, strict=True)
        grads = [dq[0] + dq[1], torch.cat(dk, 2), torch.cat(dv, 2)]
        return [partial[0], *grads, *([torch.cat(dmask, 3)] if need_dmask else [])]

    if check.compiled:
        run = torch.compile(make_fx(run, tracing_mode="fake")(q, k, v, dout, mask))
    return run(q, k, v, dout, mask)


def errors(found: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Relative to the norm: of the output, and of the worst gradient."""
    apart = [
        float((x.double() - y).norm() / y.norm().clamp(min=1e-30))
        for x, y in zip(found, want, strict=True)
    ]
    return apart[0], max(apart[1:]) if all(e == e for e in apart) else float("nan")


def cell(check: Check, name: str, mask, want, base: tuple[float, float]) -> tuple[str, str]:
    """What to print, and what is wrong."""
    try:
        with kernels.using(name):
            found = errors(by_kernel(check, mask), want)
    except UnsupportedError:
        return "-", ""
    except Exception as error:  # one kernel that fails must not stop the rest
        first = (str(error).splitlines() or [""])[0]
        return "fails", f"{check.name}, {name}: {type(error).__name__}: {first}"
    allowed = [max(ROUNDING[check.dtype], 4 * plain_error) for plain_error in base]
    text = " ".join(f"{error:.1e}" for error in found)
    if all(error <= most for error, most in zip(found, allowed, strict=True)):
        return text, ""
    return text + "!", f"{check.name}, {name}: errors {text}, allowed {allowed}"


def check_errors(names: list[str]) -> list[str]:
    print(f"{'':24}{'plain':17}" + "".join(f"{name:17}" for name in names))
    wrong = []
    for check in CHECKS:
        mask = mask_of(check)
        want = plain(check, torch.float64, mask, exact)
        base = errors(plain(check, check.dtype, mask, reference(check)), want)
        cells = []
        for name in names:
            text, problem = cell(check, name, mask, want, base)
            cells.append(text)
            wrong += [problem] if problem else []
            torch._dynamo.reset()
        line = "".join(f"{text:17}" for text in (" ".join(f"{e:.1e}" for e in base), *cells))
        print(f"{check.name:24}{line}", flush=True)
    return wrong


def reference(check: Check) -> Callable:
    """torch's own; plain math where a row may see nothing, as kernels differ in that."""
    return exact if check.mask else F.scaled_dot_product_attention


def seconds(function: Callable[[], object]) -> float:
    """The median of some calls, after a warm-up."""
    times = []
    for i in range(13 if DEVICE.type == "cuda" else 3):
        if DEVICE.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
            took = start.elapsed_time(stop) / 1000
        else:
            begin = time.perf_counter()
            function()
            took = time.perf_counter() - begin
        times += [took] if i >= 2 else []
    return median(times)


def rates(name: str, first: int, band: Band, dim: int) -> str:
    """TFLOP/s of forward and of backward: queries ``first`` ... see keys 0 ... of all tokens."""
    shapes = [(32, TOKENS - first), (8, TOKENS), (8, TOKENS), (32, TOKENS - first)]
    q, k, v, dout = (torch.randn(1, *shape, dim, device=DEVICE).to(HALF) for shape in shapes)
    (piece,) = pieces([(first, TOKENS)], [(0, TOKENS)], band)
    options = {"band": piece.band, "mask": None, "scale": dim**-0.5, "keep": None}
    work = 4 * piece.area * dim * 32 / 1e12
    try:
        with kernels.using(name):
            out, lse = kernels.forward(q, k, v, **options)
            forward = seconds(lambda: kernels.forward(q, k, v, **options))
            backward = seconds(lambda: kernels.backward(dout, q, k, v, out, lse, **options))
    except UnsupportedError:
        return "-"
    except Exception as error:
        return f"fails ({type(error).__name__})"
    return f"{work / forward:.1f} {2.5 * work / backward:.1f}"


def show_rates(names: list[str]) -> None:
    names = [name for name in names if name != "math" or DEVICE.type == "cpu"]
    print(f"\nTFLOP/s forward, backward; {TOKENS} tokens, {HALF}, 32 heads, 8 of keys")
    print(f"{'':24}" + "".join(f"{name:17}" for name in names))
    window = Band(TOKENS // 8 - 1, 0)
    for label, dim, first, band in (
        ("d 128 full", 128, 0, FULL),
        ("d 128 causal", 128, 0, CAUSAL),
        ("  its second half", 128, TOKENS // 2, CAUSAL),
        (f"  window {TOKENS // 8}", 128, 0, window),
        ("d 24 full", 24, 0, FULL),
        ("d 64 causal", 64, 0, CAUSAL),
    ):
        cells = [rates(name, first, band, dim) for name in names]
        print(f"{label:24}" + "".join(f"{text:17}" for text in cells), flush=True)


def main() -> int:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}\n")
    small = [torch.zeros(1, 1, 1, 64, device=DEVICE, dtype=HALF)] * 3
    case = kernels.Case.of(*small, None, False)
    names = [kernel.name for kernel in kernels.KERNELS if kernel.fits(case)]
    wrong = check_errors(names)
    show_rates(names)
    print("\n" + "\n".join(wrong or ["all right"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
