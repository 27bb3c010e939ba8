"""How tests compare tensors: by the norm of the difference, against the size that matters.

The measure is ``||a - b|| <= tol * max(||a||, 1e-3 * scale)``, where a is expected and scale is the
size of its company (the largest gradient of the model): a gradient that is zero but for rounding
is compared with its company and not with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHOWN = 5


class _Difference(NamedTuple):
    """One tensor that is wrong; ``excess`` is how many times over the bound."""

    excess: float
    text: str


def assert_close(
    name: str, actual: Tensor | None, expected: Tensor | None, tol: float, scale: float = 0.0
) -> None:
    wrong = _difference(name, actual, expected, tol, scale)
    assert wrong is None, wrong.text


def compare_gradients(
    expected: Mapping[str, Tensor | None], actual: Mapping[str, Tensor | None], tol: float
) -> None:
    """Every gradient of ``expected`` is in ``actual``, close to it, and there are no others."""
    scale = max((_norm(g) for g in expected.values() if g is not None), default=0.0)
    names = [*expected, *(name for name in actual if name not in expected)]
    found = (_difference(n, actual.get(n), expected.get(n), tol, scale) for n in names)
    wrong = sorted((d for d in found if d is not None), key=lambda d: -d.excess)
    if wrong:
        lines = [f"{len(wrong)} of {len(names)} gradients differ (tol = {tol:g}), the worst first:"]
        lines += [f"  {d.text}" for d in wrong[:_SHOWN]]
        raise AssertionError("\n".join(lines))


def _difference(
    name: str, actual: Tensor | None, expected: Tensor | None, tol: float, scale: float
) -> _Difference | None:
    if actual is None or expected is None:
        if actual is expected:
            return None
        return _Difference(math.inf, f"{name}: {_show(actual)}, expected {_show(expected)}")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return _Difference(math.inf, f"{name}: {_show(actual)}, expected {_show(expected)}")
    size = max(_norm(expected), 1e-3 * scale)
    error = _norm(actual.detach().double() - expected.detach().double())
    if error <= tol * size:  # false for nan, as it should be
        return None
    relative = error / size if size else math.inf
    excess = math.inf if math.isnan(relative) or not tol else relative / tol
    return _Difference(excess, f"{name}: off by {relative:.2e}, ||expected|| = {size:.2e}")


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach().double()).item()


def _show(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype)[6:]}{list(tensor.shape)}"


def assert_logged(
    got: list[dict[str, float]], want: list[dict[str, float]], tol: float = 1e-6
) -> None:
    """What a Trainer logged: the same names in the same order, and the same numbers. (Losses, and
    Trainer's own sums of them, are float32.)"""
    assert [list(log) for log in got] == [list(log) for log in want]
    for mine, theirs in zip(got, want, strict=True):
        wrong = [k for k, x in theirs.items() if not math.isclose(mine[k], x, rel_tol=tol)]
        assert not wrong, f"{wrong} of {mine}, expected {theirs}"


def assert_resumed(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """A run in one piece, one that goes on from its checkpoint, and the weights that it saved."""
    assert_logged(got["once"], want["once"])
    assert_logged(got["again"], want["again"])
    assert_logged(got["again"][2:4], got["once"][2:4])
    compare_gradients(want["weights"], got["weights"], 1e-6)
