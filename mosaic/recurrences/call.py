"""One call of a recurrence as text: which function, what its tensors are called, the rest."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from mosaic.recurrences.kinds import KINDS, Given, Kind
from mosaic.recurrences.texts import BEGINS, TOLD, one_by_one


@dataclass(frozen=True)
class Recurrence:
    """``module.name(...)``; its first ``positional`` arguments are passed without their names, by
    which packages differ."""

    module: str
    name: str
    tensors: tuple[str, ...]
    options: dict[str, Any] = field(hash=False)
    positional: int

    @classmethod
    def of(
        cls, function: Callable[..., Any], given: Given, positional: int
    ) -> tuple[Recurrence, list[Tensor]]:
        """The call with these arguments, and its tensors."""
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        options = {name: x for name, x in given.items() if name not in tensors}
        where = (function.__module__, function.__name__)
        return cls(*where, tuple(tensors), options, positional), list(tensors.values())

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @lru_cache(maxsize=4096)
    def decode(cls, text: str) -> Recurrence:
        read = json.loads(text)
        return cls(**{**read, "tensors": tuple(read["tensors"])})

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(sys.modules[self.module], self.name)
        return found

    def given(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        """All arguments by name, with the function's own defaults."""
        named = zip(self.tensors, tensors, strict=True)
        return {**defaults(self.function), **self.options, **dict(named)}

    @property
    def is_opaque(self) -> bool:
        """Whether an inner compiler does not see what it does: kernels of a package, and packed
        texts, of which the program does not know how many there are."""
        return BEGINS in self.tensors or is_of_package(self.function)

    def run(self, **given: Any) -> tuple[Tensor, Tensor]:
        """The result and the last state."""
        begins, run, kind = given.pop(BEGINS, None), partial(self.called, self.function), self.kind
        if begins is None:
            return run(given)
        if kind.texts in taken_by_package(self.function):
            return TOLD[kind.texts](run, given, begins, kind.state)
        return one_by_one(run, given, begins, kind.rows, kind.state, kind.out)

    def called(self, function: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor]:
        first = names_of(function)[: self.positional]
        rest = {name: x for name, x in given.items() if name not in (*first, BEGINS)}
        out, last = function(*(given[name] for name in first), **rest, **{self.kind.asks: True})
        return out, last


@lru_cache(maxsize=64)
def names_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@lru_cache(maxsize=64)
def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Those of arguments that may be left out, but for the one that asks for the last state."""
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: x for name, x in found.items() if name != KINDS[function.__name__].asks}


def is_of_package(function: Callable[..., Any]) -> bool:
    """Whether transformers runs a package's kernels in place of the function that is written."""
    return bool(taken_by_package(function))


def taken_by_package(function: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that such kernels take; none where there are none."""
    inner = inspect.getclosurevars(function).nonlocals if hasattr(function, "__wrapped__") else {}
    return inner["applicable_params"] if inner.get("is_new_implementation") else ()


def rows_of(call: str) -> tuple[int, int]:
    """Which tensor of a call has its rows, and in which dim."""
    known = Recurrence.decode(call)
    at = next(i for i, name in enumerate(known.tensors) if name in known.kind.rows)
    return at, known.kind.rows[known.tensors[at]]
