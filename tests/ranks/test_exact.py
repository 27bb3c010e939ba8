"""Programs that were once silently wrong are right, or refused, on two ranks."""

from __future__ import annotations

import pytest
from exact_dying import PROGRAMS
from exact_jobs import check
from sampling import sampled

#: Each goes wrong where another one does: behind the marker.
ALIKE = (
    "as_strided of an input",
    "complex conjugate",
    "complex mean over the axis",
    "complex variance",
    "cross-covariance, written out",
    "head dim with a stride",
    "one query head for repeated keys",
    "keys and values repeated unequally",
    "norm, affine",
    "norm, batch, cumulative",
    "norm, eval",
    "norm, plain",
    "norm, spectral, parametrized",
    "norm, weight",
    "output of an input, expanded",
    "peaks, aminmax",
    "peaks, amin",
    "peaks, clamped",
    "peaks, max",
    "peaks, max dim",
    "peaks, min",
    "peaks, norm of infinity",
    "peaks, softmax",
    "peaks, softmin",
    "scale -0.001, causal",
    "scale -0.001, full",
    "scale -0.5, full",
    "scale 0.0, causal",
    "a deep mask",
    "a long accumulation",
    "a long recipe",
    "a long way to a softmax",
    "a mask that compares booleans",
    "mask of int8",
)


@pytest.mark.parametrize("name", sampled(PROGRAMS, ALIKE))
def test_exact(ranks, name: str) -> None:
    for refusal, wrong in ranks(2).run(check, name, 2):
        assert not wrong, "\n".join(wrong)
        assert refusal.startswith(PROGRAMS[name].refusal) and bool(refusal) == bool(
            PROGRAMS[name].refusal
        )
