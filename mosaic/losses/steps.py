"""What a model does to its logits, element by element, before their softmax: a softcap, a scale, a
cast.

    z = linear(hidden, head); z = z.float() / 30; z = tanh(z) * 30
    ->   "to float32; div 30.0; tanh; mul 30.0"
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """``op``: "to" (a dtype's name), "mul" or "div" (a number), or "tanh"."""

    op: str
    value: str = ""

    def __call__(self, z: Tensor) -> Tensor:
        if self.op == "to":
            return z.to(getattr(torch, self.value))
        if self.op == "tanh":
            return z.tanh()
        return z * float(self.value) if self.op == "mul" else z / float(self.value)

    def gradient(self, dout: Tensor, before: Tensor, after: Tensor) -> Tensor:
        if self.op == "to":
            return dout.to(before.dtype)
        if self.op == "tanh":
            return dout * (1 - after * after)
        return self(dout)


def encode(steps: tuple[Step, ...]) -> str:
    return "; ".join(" ".join(step).strip() for step in steps)


def decode(text: str) -> tuple[Step, ...]:
    return tuple(Step(*one.split()) for one in text.split("; ") if one)
