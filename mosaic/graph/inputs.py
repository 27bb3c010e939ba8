"""What a compiled graph is given, as the user calls it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: ``policy(about, op, *args, **kwargs)`` says whether backward keeps an op's result.
Policy = Callable[..., Any]


@dataclass(frozen=True)
class Input:
    """One input of the compiled graph: a tensor argument, a parameter, a buffer, or a size."""

    index: int
    source: str  # as Dynamo writes it: L['x'], L['self']._parameters['weight']
    is_state: bool  # a parameter or a buffer

    @property
    def name(self) -> str:
        """What the user calls it: ``x``, or ``layers.0.weight`` for state."""
        if self.is_state:
            return ".".join(re.findall(r"\['(\w+)'\]", self.source.removeprefix("L['self']")))
        return self.source.removeprefix("L['").replace("']", "", 1)
