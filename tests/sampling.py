"""What CI leaves out: ``pytest -m full`` runs it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import pytest

FULL = partial(pytest.param, marks=pytest.mark.full)


def sampled(names: Iterable[str], elsewhere: Collection[str]) -> list[object]:
    """All names; those that are shown elsewhere are behind the marker."""
    return [FULL(name) if name in elsewhere else name for name in names]
