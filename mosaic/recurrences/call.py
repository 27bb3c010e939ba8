"""One call of a recurrence as text: which function, what its tensors are called, the rest."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mosaic.recurrences.kinds import KINDS, Kind


@dataclass(frozen=True)
class Recurrence:
    """``module.name(**tensors, **options)``."""

    module: str
    name: str
    tensors: tuple[str, ...]
    options: dict[str, Any] = field(hash=False)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @lru_cache(maxsize=4096)
    def decode(cls, text: str) -> Recurrence:
        read = json.loads(text)
        return cls(**{**read, "tensors": tuple(read["tensors"])})

    def given(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        """All arguments by name, with the function's own defaults."""
        named = zip(self.tensors, tensors, strict=True)
        return {**defaults(self.function), **self.options, **dict(named)}

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(sys.modules[self.module], self.name)
        return found

    def run(self, **given: Any) -> tuple[Tensor, Tensor]:
        """The result and the last state."""
        out, last = self.function(**given, **{self.kind.asks: True})
        return out, last


@lru_cache(maxsize=64)
def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Those of arguments that may be left out, but for the one that asks for the last state."""
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: x for name, x in found.items() if name != KINDS[function.__name__].asks}


def rows_of(call: str) -> tuple[int, int]:
    """Which tensor of a call has its rows, and in which dim."""
    known = Recurrence.decode(call)
    at = next(i for i, name in enumerate(known.tensors) if name in known.kind.rows)
    return at, known.kind.rows[known.tensors[at]]


def widened(x: Any) -> Any:
    """A tensor of two bytes an element in four: what it gives is added to before it is rounded."""
    is_half = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize == 2
    return x.float() if is_half else x


@torch.library.custom_op(
    "mosaic::recurrence",
    mutates_args=(),
    schema="(Tensor[] tensors, str call) -> (Tensor, Tensor)",
)
def recurrence(tensors, call):
    """A call in the global graph: its result and the last state. ``partition`` writes it out."""
    raise AssertionError("mosaic::recurrence stands for a call and is never run")


@recurrence.register_fake
def _(tensors, call):
    """Of one row, and as long as the rows are."""
    known = Recurrence.decode(call)
    kind, given = known.kind, known.given(tensors)
    rows = next(given[name].shape[dim] for name, dim in kind.rows.items() if name in given)
    cut = {
        name: given[name].narrow(dim, 0, 1)
        for name, dim in kind.rows.items()
        if given.get(name) is not None
    }
    out, last = known.run(**{**given, **cut})
    shape = [rows if d == kind.out else n for d, n in enumerate(out.shape)]
    return out.new_empty(shape), last.new_empty(last.shape)


RECURRENCE = torch.ops.mosaic.recurrence.default
