"""A recurrence over rows that several ranks hold, in stretches: each is answered for by itself,
the states between them follow from all of these, and are then read.

    stretch:     own, reading, (state, along)      each rank, of its rows
    all ranks:   (state, along) of every stretch   one all-gather: a matrix or two for each head
    every rank:  S before each stretch, one by one: S' = state + along S
    stretch:     own + reading S

These are ordinary functions, through which autograd goes. ``runs``: where a rank's stretches lie in
its memory. One without rows takes part with a row of zeros, whose result is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.recurrences.call import Recurrence, is_of_package
from mosaic.recurrences.kinds import Run
from mosaic.recurrences.op import RECURRENCE

Runs = Sequence[tuple[int, int]]


def run_whole(call: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The user's call, with the last state."""
    known = Recurrence.decode(call)
    out, last = running(known)(**known.given(tensors))
    return out.contiguous(), last.contiguous()


def running(known: Recurrence) -> Run:
    """The user's function; what cannot be looked into goes into a graph as the op."""
    if not known.is_opaque:
        return known.run

    def run(**given: Any) -> tuple[Tensor, Tensor]:
        again, tensors = Recurrence.of(known.function, given, known.positional)
        out, last = RECURRENCE(tensors, again.encode())
        return out, last

    return run


def widened(x: Any) -> Any:
    """A tensor of two bytes an element in four, in which such functions compute: what comes of it
    is added to before it is rounded. (Kernels take what they are given.)"""
    is_half = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize == 2
    return x.float() if is_half else x


def answered(call: str, runs: Runs, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank's stretches give from a state of zero, their readings, and for each stretch what
    the others need of it, flattened: its last state, and what becomes of any before it."""
    known = Recurrence.decode(call)
    wide = tensors if is_of_package(known.function) else [widened(x) for x in tensors]
    kind, given, run = known.kind, known.given(wide), running(known)
    found = [kind.respond(run, stretch) for stretch in stretches(kind.rows, given, runs)]
    own = torch.cat([x.own for x in found], kind.out)
    reading = torch.cat([x.reading for x in found], kind.reading)
    sent = torch.stack([torch.cat([x.state.flatten(), x.along.flatten()]) for x in found])
    return own, reading, sent[: len(runs)]


def stretches(
    rows: Mapping[str, int], given: Mapping[str, Any], runs: Runs
) -> list[dict[str, Any]]:
    """The arguments of each."""
    cut = {name: dim for name, dim in rows.items() if given.get(name) is not None}
    if not runs:
        pads = {name: [0, 0] * (given[name].ndim - 1 - dim) + [0, 1] for name, dim in cut.items()}
        return [{**given, **{name: F.pad(given[name], pad) for name, pad in pads.items()}}]
    return [
        {**given, **{n: given[n].narrow(d, start, stop - start) for n, d in cut.items()}}
        for start, stop in runs
    ]


def states(
    call: str, sent: Tensor, shape: Sequence[int], like: torch.dtype, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each stretch (stretches, elements), of what was ``sent`` by all ranks, and
    the one behind the last (``shape``)."""
    kind, dtype = Recurrence.decode(call).kind, sent.dtype
    state = sent.new_zeros(shape) if first is None else first.to(dtype)
    before = []
    with torch.autocast(sent.device.type, enabled=False):
        for row in sent:
            before.append(state.flatten())
            own, along = row.split([prod(shape), row.numel() - prod(shape)])
            state = own.view(shape) + kind.carried(along.view(kind.along_shape(shape)), state)
    return torch.stack(before), state.to(like).contiguous()


def read(
    call: str, runs: Runs, own: Tensor, reading: Tensor, before: Tensor, shape: Sequence[int],
    like: torch.dtype,
) -> Tensor:  # fmt: skip
    """What a rank's stretches give behind the states ``before`` them."""
    kind, sizes = Recurrence.decode(call).kind, [stop - start for start, stop in runs]
    if not runs:
        before = F.pad(before, (0, 0, 0, 1))
    found = []
    with torch.autocast(own.device.type, enabled=False):
        for part, state in zip(reading.split(sizes or 1, kind.reading), before, strict=True):
            found.append(kind.read(part.to(state.dtype), state.view(shape)))
    out = (own + torch.cat(found, kind.out)).to(like)
    return out.contiguous() if runs else out.narrow(kind.out, 0, 0).contiguous()
