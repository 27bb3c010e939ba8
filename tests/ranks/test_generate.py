"""Prefill is cut, and decoding runs whole: the tokens of one process, and no more programs than
plain torch.compile makes."""

from __future__ import annotations

from functools import partial

import generate_jobs as jobs
import pytest
import torch
from compare import assert_close
from sampling import FULL

#: The programs of plain torch.compile: the prompt's, one token, and (where the cache grows) one
#: token at any length.
GRAPHS = {"dynamic": 3, "static": 2}


@pytest.mark.parametrize(
    "p, how, cache",
    [
        (2, "parallelize", "dynamic"),
        FULL(2, "compile", "dynamic"),
        FULL(3, "parallelize", "static"),
        FULL(1, "compile", "dynamic"),
        FULL(1, "parallelize", "dynamic"),
        FULL(3, "compile", "dynamic"),
        FULL(3, "parallelize", "dynamic"),
        FULL(1, "compile", "static"),
        FULL(2, "compile", "static"),
        FULL(3, "compile", "static"),
    ],
)
def test_generate_of_transformers(ranks, p: int, how: str, cache: str) -> None:
    want = jobs.generated(0, "compile", cache)
    assert want["graphs"] == GRAPHS[cache]
    for got in ranks(p).run(jobs.generated, p, how, cache):
        assert torch.equal(got["tokens"], want["tokens"])
        assert_close("logits", got["logits"], want["logits"], 1e-6)  # a norm works in float32
        assert got["graphs"] == GRAPHS[cache]
        assert [bool(layout) for layout in got["cut"]] == [True, False, False][: got["graphs"]]
        assert got["said"] == (p > 1)


@pytest.mark.parametrize("p, how", [FULL(2, "compile"), FULL(3, "parallelize")])
def test_generate_from_states(ranks, p: int, how: str) -> None:
    """The prompt's last states are whole on every rank, as are its keys and values."""
    run = partial(jobs.generated, how=how, cache="dynamic", build=jobs.with_gated_deltas)
    want = jobs.generated(0, "compile", "dynamic", jobs.with_gated_deltas)
    for got in ranks(p).run(run, p):
        assert torch.equal(got["tokens"], want["tokens"])
        assert_close("logits", got["logits"], want["logits"], 1e-5)  # states are float32
        assert got["said"]


@pytest.mark.parametrize("p", [2, FULL(3)])
def test_a_cache_with_room_stays_cut(ranks, p: int) -> None:
    """Each rank holds a p-th of it, and a step attends to all: one program for all steps."""
    want = jobs.cut_cache(0)
    every = ranks(p).run(jobs.cut_cache, p)
    for got in every:
        assert_close("logits", got["logits"], want["logits"], 1e-12)
        assert got["graphs"] == want["graphs"] == 2
        assert all(got["cut"]) and got["gathered"] == []
    assert sum(got["rows"] for got in every) == jobs.LONGEST


@pytest.mark.parametrize("p", [FULL(2), FULL(3)])
def test_a_static_cache_is_cut_after_the_prompt(ranks, p: int) -> None:
    want = jobs.cut_static_cache(0)
    every = ranks(p).run(jobs.cut_static_cache, p)
    for got in every:
        assert_close("logits", got["logits"], want["logits"], 1e-6)  # a norm works in float32
        assert got["graphs"] == want["graphs"] == 2
        assert got["cut"][-1].startswith(f"{jobs.LONGEST}=")
        assert not any("attention" in line for line in got["gathered"])
    assert sum(got["rows"] for got in every) == jobs.LONGEST


@pytest.mark.parametrize("p", [2, FULL(1), FULL(3)])
def test_a_loop_by_hand(ranks, p: int) -> None:
    want = jobs.by_hand(0)
    for got in ranks(p).run(jobs.by_hand, p):
        assert_close("logits", got["logits"], want["logits"], 1e-12)
        assert got["graphs"] == want["graphs"] == 3
        assert [bool(layout) for layout in got["cut"]] == [True, False, False]
        assert got["said"] == (p > 1)
