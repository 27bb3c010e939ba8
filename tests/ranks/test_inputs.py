"""Models that attend by other calls than SDPA: what they give is what they give in one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_close, compare_gradients
from input_jobs import (
    flex,
    flex_without_a_compiler,
    other_documents,
    other_texts,
    packed,
    run_input,
    run_llama,
    run_stack,
)
from sampling import FULL, sampled

#: What a case is, and how the plan calls its mask.
CASES = {
    "causal": ({"mask": "causal"}, "causal"),
    "window": ({"mask": "window"}, "causal, window 9"),
    "documents": ({"mask": "documents"}, "causal, documents"),
    "prefix": ({"mask": "prefix"}, "boolean by tiles"),
    "dilated": ({"mask": "dilated"}, "boolean by tiles"),
    "alibi": ({"mask": "causal", "scores": "alibi"}, "causal, float by tiles"),
    "relative": ({"mask": "documents", "scores": "relative"}, "causal, documents, float by tiles"),
    "doubled": ({"scores": "doubled"}, "causal"),
    "capped": (
        {"mask": "documents", "scores": "capped", "kv_heads": 2},
        "softcap 2, causal, documents, float by tiles",
    ),
    "full": ({}, ""),
    "gqa": ({"mask": "documents", "kv_heads": 2}, "causal, documents"),
    "made_inside": ({"mask": "documents", "makes_mask": True}, "causal, documents"),
}
#: Of the others each part is in one of these, or in another test here ("relative" with its LSE).
FEW = [(name, 2) for name in ("prefix", "capped", "made_inside")]
MORE = [(name, p) for name in CASES for p in (1, 2, 3) if (name, p) not in FEW]
MORE.append(("documents", 4))


@pytest.mark.parametrize("name, p", [*FEW, *(FULL(*case) for case in MORE)])
def test_flex_attention(ranks, name: str, p: int) -> None:
    given, words = CASES[name]
    check(ranks, partial(flex, **given), words, p)


@pytest.mark.parametrize("name", ["alibi", FULL("relative"), FULL("documents"), FULL("doubled")])
def test_halves(ranks, name: str) -> None:
    """Biases are made and added in float32, as flex does."""
    given, words = CASES[name]
    build = partial(flex, **given, dtype=torch.bfloat16)
    want = run_input(partial(flex, **given, rounds=True), None)
    for got in ranks(2).run(run_input, build, {"inner": "eager"}, 2):
        assert_close("loss", got["loss"].double(), want["loss"], 0.01)
        found = {name: x.double() for name, x in got["gradients"].items() if x is not None}
        kept = {name: x for name, x in want["gradients"].items() if name in found}
        compare_gradients(kept, found, 0.03)
        assert got["masks"] == [words]


def test_other_documents_are_no_other_program(ranks) -> None:
    for found in ranks(2).run(other_documents, 2):
        counts, errors = zip(*found, strict=True)
        assert counts == (1, 1, 1)
        assert max(errors) < 1e-12


def test_blocks_that_share_a_mask(ranks) -> None:
    found = ranks(2).run(run_stack, 2)
    want = run_stack(1)
    for rank, got in enumerate(found):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-12)


@pytest.mark.full
@pytest.mark.parametrize("p", [2, 3])
def test_llama_by_flex_attention(ranks, p: int) -> None:
    want = run_llama(1)
    for rank, got in enumerate(ranks(p).run(run_llama, p)):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert got["masks"] == {"causal, documents"}
        assert got["programs"] == 1


def test_flex_attention_without_a_compiler(ranks) -> None:
    for said in ranks(2).run(flex_without_a_compiler):
        assert "flex_attention of a tensor that is cut, outside of a compiled function" in said
        assert "flex_attention(x, x, x)" in said


TEXTS = {
    "varlen": ({"call": "varlen"}, "documents"),
    "varlen_causal": ({"call": "varlen", "window": (-1, 0), "kv_heads": 2}, "causal, documents"),
    "varlen_window": ({"call": "varlen", "window": (5, 0)}, "causal, window 6, documents"),
    "varlen_crossing": (
        {"call": "varlen", "window": (-1, 0), "crosses": True},
        "documents, boolean by tiles",
    ),
    "package": ({"call": "package", "window": (5, 2)}, "window -5 to +2, documents"),
    "package_dense": ({"call": "dense", "kv_heads": 1}, "causal, window 10"),
    "package_dense_crossing": ({"call": "dense", "crosses": True}, "window +5 to +14"),
}
LESS = ("varlen", "varlen_window", "package_dense")


@pytest.mark.parametrize("p", [2, FULL(1), FULL(3)])
@pytest.mark.parametrize("name", sampled(TEXTS, LESS))
def test_texts(ranks, name: str, p: int) -> None:
    given, words = TEXTS[name]
    check(ranks, partial(packed, **given), words, p)


@pytest.mark.parametrize("call", ["varlen", FULL("package")])
def test_other_texts_are_no_other_program(ranks, call: str) -> None:
    """But for the second length of the longest one, which Dynamo takes for a number till then."""
    for found in ranks(2).run(other_texts, call, 2):
        counts, errors = zip(*found, strict=True)
        assert counts == (1, 2, 2, 2)
        assert max(errors) < 1e-12


@pytest.mark.parametrize("p", [2, FULL(3)])
@pytest.mark.parametrize("name", ["relative", *map(FULL, ("documents", "capped", "dilated"))])
def test_log_sum_exp(ranks, name: str, p: int) -> None:
    """With its gradient; a bias is in it."""
    given, words = CASES[name]
    check(ranks, partial(flex, **given, reads_lse=True), words, p)


def check(ranks, build, words: str, p: int, tol: float = 1e-12) -> None:
    found = ranks(p).run(run_input, build, {"inner": "eager"}, p)
    want = run_input(build, None)
    for rank, got in enumerate(found):
        assert_close(f"loss of rank {rank}", got["loss"], want["loss"], tol)
        compare_gradients(want["gradients"], got["gradients"], tol)
        assert got["masks"] == [words]
        assert not got["strips"], "\n".join(got["strips"])
