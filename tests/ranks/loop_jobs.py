"""Recurrences that Mosaic does not know, and what one rank does with them in tests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from model_jobs import gradients
from torch import Tensor, nn

import mosaic


class Loop(nn.Module):
    """A state with a step that is not affine; and attention before it, behind it, or none."""

    def __init__(self, before: bool = False, behind: bool = False) -> None:
        super().__init__()
        self.before, self.behind, self.step = before, behind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x) if self.before else x
        state, states = x.new_zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.step(state) + x[:, t])
            states.append(state)
        y = torch.stack(states, 1)
        return F.scaled_dot_product_attention(y, x, y) if self.behind else y


class Recurrent(nn.Module):
    """torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class Gates(nn.Module):
    """Rows by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "loop": Loop,
    "loop and attention": lambda: Loop(behind=True),
    "attention and loop": lambda: Loop(before=True),
    "lstm": Recurrent,
    "rows": Gates,
}


def run_loop(name: str, p: int) -> dict[str, Any]:
    """The result, gradients, and what is said; with p > 0 through Mosaic, twice."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    called: Any = model
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mosaic").addHandler(listener)
    if p:
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
        called(x)
    out = called(x)
    out.square().sum().backward()
    logging.getLogger("mosaic").removeHandler(listener)
    return {"result": out.detach(), "gradients": {**gradients(model), "x": x.grad}, "said": said}
