"""How long kernels take for short sequences, which leave most of a tile empty.

Their rates say nothing there: what counts is how long a tile takes at least. So what was measured
is looked up, for forward and for backward.
"""

from __future__ import annotations

from math import inf

import torch

from mosaic.attention.kernels.kernel import Case, Kernel

FORWARD, BACKWARD = 0, 1

#: Milliseconds forward and backward by kernel, for 550,000 tokens in sequences of 11, 32 and 64,
#: with 4 heads of 24, on one H100 (torch 2.11; ``tests/gpu/check_table.py`` measures it again).
#: flash_attn 4: 11 tokens on an H200, where the others differ from the H100 by 5%. A sequence
#: longer than 64 is no longer short: at 128 tokens cuDNN takes 0.38, 1.17, efficient 0.73, 1.64.
Times = dict[int, dict[str, tuple[float, float]]]
HALF: Times = {
    11: {
        "flash_attn 4": (5.3, 8.1),
        "cudnn": (3.38, 5.30),
        "flash": (3.64, 11.91),
        "efficient": (2.10, 4.60),
        "math": (2.16, 4.73),
    },
    32: {
        "cudnn": (1.18, 2.21),
        "flash": (1.32, 4.63),
        "efficient": (0.78, 1.86),
        "math": (3.03, 4.39),
    },
    64: {
        "cudnn": (0.71, 1.68),
        "flash": (0.85, 2.82),
        "efficient": (0.53, 1.35),
        "math": (4.32, 6.19),
    },
}
SINGLE: Times = {
    11: {"efficient": (5.39, 10.01), "math": (1.71, 3.78)},
    32: {"efficient": (1.99, 4.05), "math": (2.60, 3.51)},
    64: {"efficient": (1.27, 3.01), "math": (3.81, 5.20)},
}


def quickest(able: list[Kernel], case: Case, length: int, direction: int) -> Kernel:
    """The first, or of short sequences of at most ``length`` tokens the one that took least."""
    if not case.plain or case.device != "cuda" or case.dtype == torch.float64:
        return able[0]
    times = SINGLE if case.dtype == torch.float32 else HALF
    measured = next((times[n] for n in times if length <= n), {})
    return min(able, key=lambda kernel: measured.get(kernel.name, (inf, inf))[direction])
