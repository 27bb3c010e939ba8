"""How long kernels take, as measured: the table that they are chosen by.

What is short leaves most of a tile empty, a window much of a row, and rates of long sequences say
nothing of it. So what was measured nearest to a block is looked up: of this device where ``python
-m mosaic calibrate`` has run (``calibrate.py``), else of the H100 and H200 here. A kernel is a
rank's own affair, and each is exact: ranks with other tables may choose others, and merge.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from math import inf, log2
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import torch

from mosaic.api.errors import UnsupportedError
from mosaic.attention.blocks import Piece
from mosaic.attention.kernels.kernel import Case, Kernel
from mosaic.attention.kernels.rates import H100, H200

FORWARD, BACKWARD = slice(0, 1), slice(1, 2)
BOTH = slice(0, 2)
UNKNOWN = (inf, inf)
Times = dict[str, tuple[float, float]]


class Point(NamedTuple):
    """What times depend on. ``bits`` of a number; ``heads`` of all batches; ``band``: "", "causal"
    or "window"."""

    bits: int
    dim: int
    rows: int
    keys: int
    heads: int
    band: str

    @classmethod
    def of(cls, case: Case, piece: Piece) -> Point:
        band = "window" if piece.lower is not None else "causal" if piece.upper is not None else ""
        dim = max(case.head_dim, case.v_dim)
        return cls(case.dtype.itemsize * 8, dim, piece.rows, piece.keys, case.heads, band)

    @property
    def words(self) -> str:
        size = f"{self.bits} bits, {self.heads} heads of {self.dim}, {self.rows} x {self.keys}"
        return f"{size}, {self.band}" if self.band else size

    def apart(self, other: Point) -> float:
        """In powers of 2; what has other numbers, or another band, is not like it at all."""
        if (self.bits, self.band) != (other.bits, other.band):
            return inf
        pairs = ((self.dim, other.dim), (self.rows, other.rows), (self.keys, other.keys))
        return sum(abs(log2(a / b)) for a, b in (*pairs, (self.heads, other.heads)))


def quickest(able: Sequence[Kernel], case: Case, piece: Piece, way: slice) -> Kernel:
    """The kernel that took least where it was measured nearest; the first where none was."""
    if case.device != "cuda" or not case.plain:
        return able[0]
    point, known = Point.of(case, piece), table(device_name())
    nearest = min(known, key=point.apart, default=None)
    if nearest is None or point.apart(nearest) == inf:
        return able[0]
    times = known[nearest]
    return min(able, key=lambda kernel: sum([*times.get(kernel.name, UNKNOWN)][way]))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@cache
def table(device: str) -> dict[Point, Times]:
    """What is known of a device, of what is most like it where nothing was measured: an H100 has
    the H200's chip."""
    known: dict[Point, Times] = {}
    for times in (H200, H100 if "H100" in device else {}, read(path_of(device))):
        for point, row in times.items():
            known[Point(*point)] = known.get(Point(*point), {}) | row
    return known


def path_of(device: str) -> Path:
    """Where this user keeps what was measured of a device, with this torch."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^\w.+-]+", "-", f"kernels-{device}-{torch.__version__}")
    return Path(home, "mosaic", f"{name}.json")


def read(path: Path) -> dict[Point, Times]:
    """What ``write`` wrote; nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {Point(*point): {k: (t[0], t[1]) for k, t in row.items()} for point, row in rows}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UnsupportedError(
            "the measured times of kernels cannot be read",
            file=path,
            error=error,
            fix="remove the file, or measure again: python -m mosaic calibrate",
        ) from error


def write(path: Path, times: dict[Point, Times]) -> None:
    """At once, so that no rank reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps([point, row]) for point, row in times.items())
    with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(f"[{rows}]\n")
    os.replace(file.name, path)
