"""What a half-written program has computed: its values, by the text that names them.

Every step is run as it is written, so shapes and dtypes are known, and one that fails is dropped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz.draw import Draw
from fuzz.program import HEAD, Step, names_in
from torch import Tensor, nn

LARGEST = 6_000  # elements: a program is compiled for its shapes, so small ones do
STEEPEST = 1e3


@dataclass
class Scope:
    """Values that later steps may use, and the steps that made them."""

    draw: Draw
    space: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    count: int = 0
    axis: int = 0  # the length of the axis that is cut
    attended: set[str] = field(default_factory=set)  # names of what an attention led to

    def __post_init__(self) -> None:
        exec(HEAD, self.space)
        self.space["self"] = nn.Module()

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def give(self, name: str, text: str) -> None:
        """An input of the model."""
        exec(f"{name} = {text}", self.space)
        self.values[name] = self.space[name]

    def take(self, step: Step, name: str) -> bool:
        """Run a step that binds ``name``, and keep it if it makes sense."""
        torch.manual_seed(self.count)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec("\n".join((*step.setup, *step.inputs, *step.lines)), self.space)
        except Exception:
            return False
        found = {}
        for text, value in named_parts(name, self.space[name]):
            if not isinstance(value, Tensor) or not self.is_sane(value):
                return False
            found[text] = value
        self.values |= found
        for line in step.inputs:
            self.values[line.partition(" ")[0]] = self.space[line.partition(" ")[0]]
        self.steps.append(step)
        if self.attended & names_in(step.text):
            self.attended.add(name)
        return bool(found)

    def is_sane(self, value: Tensor) -> bool:
        if not 0 < value.numel() <= LARGEST or value.ndim > 6:
            return False
        if not (value.is_floating_point() or value.is_complex()):
            return True
        largest = value.detach().abs().max().item()
        return largest < STEEPEST or (largest != largest and self.draw.chance(5))

    def pick(self, allowed: Any = lambda t: True) -> str | None:
        """The text of a value; recent ones, and those along the axis, are likelier."""
        fitting = [name for name, value in self.values.items() if allowed(value)]
        if not fitting:
            return None
        follows = [n for n in fitting if self.is_attended(n)]
        if follows and self.draw.chance(75):
            fitting = follows
        along = [n for n in fitting if self.axis in self.values[n].shape]
        if along and not self.draw.chance(25):
            fitting = along
        recent = fitting[-4:][::-1]
        return self.draw.choice(recent if self.draw.chance(70) else fitting)

    def is_attended(self, text: str) -> bool:
        return bool(self.attended & names_in(text))

    def shaped(self, shape: Any, unlike: str = "") -> str | None:
        """The text of another float value of that shape."""
        return self.pick(lambda t: is_float(t) and t.shape == shape and t is not self[unlike])

    def __getitem__(self, name: str) -> Tensor | None:
        return self.values.get(name)


def named_parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """``("v", (a, b))`` -> ``("v[0]", a), ("v[-1]", b)``; a tensor is itself."""
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list)):
        return [(name, value)]
    parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    return parts if len(parts) < 4 else [parts[0], parts[1], (f"{name}[-1]", value[-1])]


def is_float(value: Tensor) -> bool:
    return value.is_floating_point()
