"""The user's own autograd.Functions, while a graph with calls of them is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch


@dataclass
class AutogradFunctions:
    """The bodies of the user's autograd.Functions, by the number that stands in the opaque node.
    They are needed while a graph is compiled (``kept``): AOTAutograd traces them into it."""

    calls: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        number = next(self.numbers)
        self.calls[number] = (target, args, kwargs)
        return number

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Forget afterwards what is added meanwhile."""
        before = set(self.calls)
        try:
            yield
        finally:
            for number in self.calls.keys() - before:
                del self.calls[number]

    def run(self, number: int, tensors: Sequence[torch.Tensor]) -> Any:
        target, args, kwargs = self.calls[number]
        left = iter(tensors)
        full = [next(left) if isinstance(a, torch.Tensor) else a for a in args]
        return target(*full, **kwargs)


AUTOGRAD_FUNCTIONS = AutogradFunctions()
