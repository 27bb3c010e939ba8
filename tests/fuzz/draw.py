"""Where a generator's choices come from: a seed, or hypothesis, which can shrink them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """All choices are whole numbers between two bounds; the lower bound is the simplest choice."""

    integer: Callable[[int, int], int]

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in any order."""
        left = list(options)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(min(count, len(left)))]


def seeded(seed: int) -> Draw:
    return Draw(random.Random(seed).randint)


def drawn(data: Any) -> Draw:
    """``data`` is what ``st.data()`` gives a test."""
    return Draw(lambda low, high: data.draw(st.integers(low, high)))
