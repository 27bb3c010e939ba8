"""Measure the kernels of this device, for the table that they are chosen by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mosaic.api.errors import UnsupportedError
from mosaic.attention import kernels
from mosaic.attention.blocks import CAUSAL, FULL, Band, pieces
from mosaic.attention.kernels.flex import FLEX
from mosaic.attention.kernels.kernel import STRUCTURE, Case
from mosaic.attention.kernels.measured import Point, Times, device_name, path_of, read, write
from mosaic.attention.structure import of_band, positions
from mosaic.layout import Interval

BANDS = {"": FULL, "causal": CAUSAL, "window": Band(1023, 0)}
#: The first are those in which kernels differ most.
POINTS = (
    *(Point(16, 24, n, n, 550_000 // n * 4, "") for n in (11, 32, 64, 128, 256, 512)),
    *(Point(32, 24, n, n, 550_000 // n * 4, "") for n in (11, 32, 64, 128, 256, 512)),
    *(Point(16, 64, n, n, 2**20 // n, "") for n in (16, 64, 128, 512)),
    *(Point(32, 64, n, n, 2**20 // n, "") for n in (16, 64, 128, 512)),
    *(Point(16, d, n, n, 2**19 // n, "") for d in (64, 128) for n in (2048, 16384)),
    *(Point(16, d, n, n, 2**19 // n, "causal") for d in (64, 128) for n in (2048, 16384)),
    *(Point(16, d, 65536, 65536, 16, "window") for d in (64, 128)),
)
#: Rows of kernels that write, or read, a number for each pair.
MOST_ROWS = {"math": 128, "efficient": 2048}
#: After so many seconds no other point is begun. A window takes the most: flex is compiled.
SECONDS, WINDOW_SECONDS = 45.0, 10.0


def calibrate(say: Callable[[str], None] = print) -> None:
    """Measure for less than a minute, and keep it for this user. What was not reached keeps the
    times that it had; another call goes on there."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "calibrate measures the kernels of a GPU, and torch sees none here",
            fix="run it where the model will run; on a CPU nothing is chosen by measured times",
        )
    start, path = time.perf_counter(), path_of(device_name())
    known = read(path)
    left = [point for point in POINTS if point not in known] or list(POINTS)
    for done, point in enumerate(left):
        latest = WINDOW_SECONDS if point.band == "window" else SECONDS
        if time.perf_counter() - start > latest:
            say(f"{len(left) - done} of {len(POINTS)} are left: call it again to go on")
            break
        known[point] = measured(point)
        write(path, known)
        shown = [f"{name} {f:.2f}, {b:.2f}" for name, (f, b) in known[point].items()]
        say(f"{point.words}: {'; '.join(shown)} ms")
    say(f"written to {path}")


def measured(point: Point) -> Times:
    """Milliseconds forward and backward of each kernel that does it."""
    dtype = torch.bfloat16 if point.bits == 16 else torch.float32
    heads = min(point.heads, 16)
    shape = (point.heads // heads, heads, point.rows, point.dim)
    q, k, v, dout = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    found = {}
    for name, options in ways(point, q):
        with kernels.using(name):
            out, lse = kernels.forward(q, k, v, **options)
            forward = partial(kernels.forward, q, k, v, **options)
            backward = partial(kernels.backward, dout, q, k, v, out, lse, **options)
            found[name] = (milliseconds(forward), milliseconds(backward))
    return found


def ways(point: Point, q: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kernels that do a point, and what each is called with: flex has a band in its mask."""
    band = BANDS[point.band]
    (piece,) = pieces([(0, point.rows)], [(0, point.keys)], band)
    case = Case.of(q, q, q, None, False)
    rest = {"scale": point.dim**-0.5, "keep": None}
    for kernel in kernels.KERNELS:
        if kernel.does(case, piece) and point.rows <= MOST_ROWS.get(kernel.name, point.rows):
            yield kernel.name, {"band": piece.band, "mask": None, **rest}
    if point.band == "window" and FLEX.fits(case._replace(mask=STRUCTURE)):
        at = positions((Interval(0, point.rows),), q.device)
        yield FLEX.name, {"band": FULL, "mask": of_band(band, at, at), **rest}


def milliseconds(call: Callable[[], object]) -> float:
    """The median of some calls, after one that may compile. A product goes before each, so that it
    does not wait for Python."""
    call()
    x, times = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda"), []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        x @ x
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return round(median(times), 3)
