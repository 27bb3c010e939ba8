"""Ranks of which one is killed, or late, while the others run a compiled graph."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import mosaic
from mosaic.runtime import rendezvous, watch


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).sin()


def steps(p: int) -> Iterator[tuple[int, Tensor]]:
    """Each step's number, and its output, whose backward is still to come."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    compiled = torch.compile(attend, backend="mosaic", options={"inner": "eager"})
    for step in range(1, 5):
        x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
        yield step, compiled(x)


@contextmanager
def logged() -> Iterator[list[str]]:
    found: list[str] = []

    def note(text: str, *args: object) -> None:
        found.append(text % args)

    with mock.patch.multiple(watch.log, warning=note, error=note):
        yield found


def one_is_killed(p: int) -> None:
    """In step 3, between forward and backward; the other raises what was logged."""
    with logged() as found:
        try:
            for step, out in steps(p):
                if step == 3 and torch.distributed.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                out.sum().backward()
        except RuntimeError:
            watch.look_once_more()
    raise RuntimeError(f"step {step}: {found}")


def one_is_late(p: int) -> tuple[list[str], list[float]]:
    """In step 3; what is logged, and how far outputs are from those of one process."""
    apart = []
    with logged() as found, mock.patch.object(rendezvous, "SAY_AFTER", 1.5):
        torch.manual_seed(0)
        wants = [attend(torch.randn(2, 13, 8, dtype=torch.float64)) for _ in range(4)]
        for step, out in steps(p):
            apart.append(float((out - wants[step - 1]).abs().max()))
            if step == 2 and torch.distributed.get_rank() == 1:
                time.sleep(5)
    return found, apart
