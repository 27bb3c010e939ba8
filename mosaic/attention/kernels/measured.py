"""How long kernels take for short sequences, which leave most of a tile empty.

Their rates say nothing there: what counts is how long a tile takes at least. So what was measured
is looked up, for forward and for backward.
"""

from __future__ import annotations

from math import inf

import torch

from mosaic.attention.kernels.kernel import Case, Kernel

FORWARD, BACKWARD = 0, 1

#: Milliseconds forward and backward by kernel, for 550,000 tokens in sequences of so many, 4 heads
#: of 24, all keys seen, on one H100 (torch 2.11, flash-attn-4 4.0.0b36), by
#: ``tests/gpu/check_table.py``. An H200 gives the same order at 11 tokens.
Times = dict[int, dict[str, tuple[float, float]]]
HALF: Times = {
    11: {
        "flash_attn 4": (5.05, 9.31),
        "cudnn": (3.34, 5.27),
        "flash": (3.58, 11.92),
        "efficient": (2.11, 4.65),
        "math": (2.31, 4.82),
    },
    32: {
        "flash_attn 4": (2.29, 3.53),
        "cudnn": (1.19, 2.20),
        "flash": (1.31, 4.59),
        "efficient": (0.86, 2.02),
        "math": (3.11, 4.45),
    },
    64: {
        "flash_attn 4": (1.26, 1.93),
        "cudnn": (0.70, 1.61),
        "flash": (0.83, 2.80),
        "efficient": (0.51, 1.34),
        "math": (4.31, 6.20),
    },
    128: {
        "flash_attn 4": (0.80, 1.35),
        "cudnn": (0.38, 1.30),
        "flash": (0.51, 1.88),
        "efficient": (0.81, 1.84),
        "math": (6.68, 9.78),
    },
    256: {
        "flash_attn 4": (1.00, 1.54),
        "cudnn": (0.55, 1.69),
        "flash": (0.66, 2.27),
        "efficient": (1.34, 3.93),
    },
    512: {
        "flash_attn 4": (1.03, 1.95),
        "cudnn": (0.83, 2.39),
        "flash": (1.08, 3.21),
        "efficient": (2.38, 7.02),
    },
}
SINGLE: Times = {
    11: {"efficient": (5.54, 10.27), "math": (1.78, 3.77)},
    32: {"efficient": (1.98, 4.20), "math": (2.54, 3.45)},
    64: {"efficient": (1.24, 2.80), "math": (3.68, 5.10)},
    128: {"efficient": (2.17, 4.68), "math": (6.13, 8.79)},
    256: {"efficient": (4.17, 10.30)},
    512: {"efficient": (7.41, 18.04)},
}
#: Wider heads are not measured, and go by the order of the table.
WIDEST = 32


def quickest(able: list[Kernel], case: Case, length: int, direction: int) -> Kernel:
    """The first, or of short sequences of at most ``length`` tokens the one that took least."""
    measurable = case.plain and case.device == "cuda" and case.dtype != torch.float64
    if not measurable or max(case.head_dim, case.v_dim) > WIDEST:
        return able[0]
    times = SINGLE if case.dtype == torch.float32 else HALF
    measured = next((times[n] for n in times if length <= n), {})
    return min(able, key=lambda kernel: measured.get(kernel.name, (inf, inf))[direction])
