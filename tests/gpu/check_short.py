"""Kernels for short sequences: right against float64, and how near to the time of the bytes.

    python tests/gpu/check_short.py

First relative errors of the output, the log-sum-exp and each gradient: odd sizes, rows and keys of
other counts, grouped heads, bands, masks of keys with batches that see nothing, and 70,000
batches. Then milliseconds forward and backward of every kernel that does it, over what reading and
writing each number once takes. Exits 1 if a result is wrong.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.kernels.calibrate import measured
from mosaic.attention.kernels.kernel import Bounds
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.measured import Point
from mosaic.attention.structure import of_keys

HALF, SINGLE = torch.bfloat16, torch.float32
ROUNDING = {HALF: 6e-3, torch.float16: 1e-3, SINGLE: 2e-6}
ALL = (None, None)


class Check(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    band: Bounds = ALL
    masked: bool = False


CHECKS = (
    Check(3, 4, 4, 11, 11, 24, 24, HALF),
    Check(70000, 2, 2, 5, 5, 16, 16, HALF),
    Check(3, 4, 2, 7, 13, 20, 40, HALF, ALL, True),
    Check(2, 4, 1, 5, 5, 8, 8, SINGLE, (None, 0)),
    Check(2, 2, 2, 100, 100, 64, 64, HALF, (-3, 5)),
    Check(2, 2, 2, 30, 30, 64, 64, SINGLE, (-3, 5)),
    Check(3, 2, 1, 33, 64, 17, 33, torch.float16, (None, 40), True),
    Check(2, 3, 3, 128, 128, 64, 64, HALF),
    Check(2, 8, 2, 128, 128, 64, 64, HALF, ALL, True),
    Check(2, 8, 2, 32, 32, 64, 64, SINGLE, ALL, True),
    Check(1, 1, 1, 1, 1, 16, 16, HALF),
    Check(5, 6, 2, 9, 100, 48, 8, HALF, ALL, True),
)
RATES = (
    Point(16, 24, 11, 11, 200_000, ""),
    Point(32, 24, 11, 11, 200_000, ""),
    Point(16, 8, 5, 5, 4_000_000, ""),
    Point(16, 16, 100, 100, 22_000, ""),
    Point(16, 32, 32, 32, 68_000, ""),
    Point(16, 64, 64, 64, 34_000, ""),
    Point(32, 64, 32, 32, 68_000, ""),
    Point(16, 64, 128, 128, 17_000, ""),
)


def tensors(check: Check) -> list[Tensor]:
    """q, k, v, dout: (batch, heads, seq, dim), of which some are views."""
    torch.manual_seed(0)
    b, dtype = check.batch, check.dtype
    q = torch.randn(b, check.rows, check.heads, check.dim, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(b, check.kv_heads, check.keys, check.dim, device="cuda").to(dtype)
    v = torch.randn(b, check.keys, check.kv_heads, check.v_dim, device="cuda").to(dtype)
    dout = torch.randn(b, check.heads, check.rows, check.v_dim, device="cuda")
    return [q, k, v.transpose(1, 2), dout]


def apart(found: Tensor, want: Tensor) -> float:
    """Relative to the norm, or to 1, of what is finite; infinite where the rest is not the same."""
    finite = want.isfinite()
    if not torch.equal(found.double()[~finite], want[~finite]):
        return float("inf")
    return float((found.double() - want)[finite].norm() / want[finite].norm().clamp(min=1))


def errors(check: Check) -> list[float]:
    """Of out, lse, dq, dk and dv."""
    q, k, v, dout = tensors(check)
    mask = None
    if check.masked:
        mask = torch.rand(check.batch, 1, 1, check.keys, device="cuda") > 0.4
        mask[0] = False
    options = {"band": check.band, "scale": check.dim**-0.5, "keep": None, "shift": None}
    exact = [x.double() for x in (q, k, v)]
    out, lse = MATH.forward(*exact, mask=mask, **options)
    grads = MATH.backward(dout.double(), *exact, out, lse, mask=mask, need_dmask=False, **options)
    options["mask"] = None if mask is None else of_keys(mask)
    with kernels.using("short float32" if check.dtype == SINGLE else "short"):
        found = kernels.forward(q, k, v, **options)
        back = kernels.backward(dout, q, k, v, *found, **options)
    pairs = zip((*found, *back[:3]), (out, lse, *grads[:3]), strict=True)
    return [apart(x, y) for x, y in pairs]


def show_rates() -> None:
    print("\nmilliseconds forward and backward, and over those of the bytes at 4.3 TB/s")
    for point in RATES:
        least = point.heads * point.rows * point.dim * point.bits / 8 / 4.3e9  # of one tensor
        cells = [
            f"{name} {f:.2f} {b:.2f} ({f / least / 4:.1f}x {b / least / 8:.1f}x)"
            for name, (f, b) in measured(point).items()
        ]
        print(f"  {point.words}: {'; '.join(cells)}", flush=True)


def main() -> int:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    print("relative errors of short: out, lse, dq, dk, dv")
    wrong = 0
    for check in CHECKS:
        found = errors(check)
        is_right = max(found) <= ROUNDING[check.dtype]
        wrong += not is_right
        text = " ".join(f"{e:.1e}" for e in found)
        print(f"  {tuple(check)}: {text}{'' if is_right else '!'}", flush=True)
    show_rates()
    print(f"\n{wrong} wrong" if wrong else "\nall right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
