"""A tensor's bits in one number, without a copy of the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements that are looked at at once, and the length of a few int64 buffers, whatever the tensor
#: is: what fits into a CPU's cache, and keeps a GPU busy.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}

#: The finalizer of MurmurHash3: shifts and odd factors, each step of which can be undone.
MIX = ((33, -0xAE502812AA7333), (33, -0x3B314601E57A13AD), (33, 1))
#: An odd number that keeps the places of elements far apart: 2^64 divided by the golden ratio.
STRIDE = -0x61C8864680B583EB

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(x: Tensor) -> Tensor:
    """int64 scalar on the device of x. Another bit in one element always gives another number;
    other numbers, or the same at other places, do but for one case in 2^64. NaN is as any bits.

    A sum of mixed (bits, place) that wraps: the same in any order, so that GPUs give it, too.
    """
    with torch.no_grad():
        total = torch.zeros([], dtype=torch.int64, device=x.device)
        start = 0
        for bits in chunks(as_integers(x.detach())):
            stop = start + bits.numel()
            mixed = torch.arange(start, stop, device=x.device).mul_(STRIDE).add_(bits)
            for shift, factor in MIX:
                high = mixed.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
                mixed.bitwise_xor_(high).mul_(factor)
            total, start = total + mixed.sum(), stop
        return total


def as_integers(x: Tensor) -> Tensor:
    """The same bits as integers, as a view; complex numbers are two."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.resolve_neg()
    return x.view(INTEGERS[x.element_size()])


def chunks(x: Tensor) -> Iterator[Tensor]:
    """All elements in their order, at most a CHUNK at once, without making x contiguous."""
    most = CHUNK.get(x.device.type, 1 << 20)
    if x.is_contiguous():
        yield from x.view(-1).split(most)
    elif x.numel() <= most:
        yield x.reshape(-1)
    else:
        rows = max(1, most // (x.numel() // x.shape[0]))
        for part in x.split(rows):
            yield from chunks(part[0] if rows == 1 else part)
