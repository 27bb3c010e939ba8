"""Calls of the package flash_attn, of versions 2 to 4: what they give is what they give in one
process, with the log-sum-exp where it is read."""

from __future__ import annotations

from functools import partial

import pytest
from flash_jobs import CALLS, OF_TEXTS, calling
from sampling import sampled
from test_inputs import check


def few(*names: str) -> list[object]:
    """These, and all others behind the marker."""
    return sampled(CALLS, set(CALLS) - set(names))


@pytest.mark.parametrize("name", few("varlen_qkvpacked", "third_plain"))
def test_calls(ranks, name: str) -> None:
    check(ranks, partial(calling, name), words_of(name), 2)


@pytest.mark.parametrize("name", few("fourth_varlen"))
def test_log_sum_exps(ranks, name: str) -> None:
    """In float32, as the package gives it; only version 4 has a gradient of it."""
    check(ranks, partial(calling, name, reads=True), words_of(name), 2, tol=1e-6)


def words_of(name: str) -> str:
    if name == "plain":
        return "causal, window 10"
    return "causal, documents" if CALLS[name] in OF_TEXTS else "causal"
