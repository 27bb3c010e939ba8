"""One sample program for the rules: a function of tensors, and the ways of cutting them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Cut = tuple[tuple[int, int], ...]  # (input, dim) of every dim that is the axis


@dataclass(frozen=True)
class In:
    """An input: its shape and what stands in it (see ``made``)."""

    shape: tuple[int, ...]
    kind: str = "normal"
    high: int = 0

    def made(self, generator: torch.Generator) -> Tensor:
        if self.kind == "int":
            return torch.randint(0, self.high, self.shape, generator=generator)
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < 0.6
        if self.kind == "ties":  # integers as floats: equal maxima on several ranks
            return (
                torch.randint(0, self.high, self.shape, generator=generator)
                .double()
                .requires_grad_()
            )
        if self.kind == "constant":  # a float input without a gradient (a buffer)
            return torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "unit":
            return (
                torch.rand(self.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
            ).requires_grad_()
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).requires_grad_()


def f(*shape: int) -> In:
    return In(shape)


def unit(*shape: int) -> In:
    """Between 0.1 and 0.9."""
    return In(shape, "unit")


def ties(high: int, *shape: int) -> In:
    return In(shape, "ties", high)


def constant(*shape: int) -> In:
    return In(shape, "constant")


def i(high: int, *shape: int) -> In:
    return In(shape, "int", high)


def b(*shape: int) -> In:
    return In(shape, "bool")


@dataclass(frozen=True)
class Case:
    """A function, its inputs, and how it is compared."""

    name: str
    run: Callable[..., Any]
    inputs: tuple[In, ...]
    pairs: bool = True  # also cut two inputs at once, where their dims are equally long
    random: bool = False  # compare with one Mosaic rank, since eager draws other numbers
    tol: float = 1e-10

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return [given.made(generator) for given in self.inputs]

    def single_cuts(self) -> list[Cut]:
        """Every (input, dim) that can be the axis."""
        return [((a, d),) for a, g in enumerate(self.inputs) for d in range(len(g.shape))]

    def cuts(self) -> list[Cut]:
        """Every (input, dim), and every two inputs whose dims are equally long."""
        single = [cut[0] for cut in self.single_cuts()]
        size = {(a, d): self.inputs[a].shape[d] for a, d in single}
        found = self.single_cuts()
        if self.pairs:
            found += [
                (s, t) for s in single for t in single if s[0] < t[0] and size[s] == size[t] > 1
            ]
        return found


class Cases(dict[str, Case]):
    """The table; ``add`` reads well in a long list."""

    def add(self, name: str, run: Callable[..., Any], *inputs: In, **kwargs: Any) -> None:
        assert name not in self, name
        self[name] = Case(name, run, inputs, **kwargs)
