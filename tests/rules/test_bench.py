"""What the script for several GPUs decides: which length is tried next, which target is missed."""

from __future__ import annotations

import sys
import time

import case_runner
import pytest
from case_runner import Case, Group, Row, Runner
from hypothesis import given
from hypothesis import strategies as st
from rank_whole import following
from targets import targets


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_longest_length_is_found_to_an_eighth(most: int, first: int) -> None:
    """``most``: the longest that fits, in multiples of 8; two are known."""
    found = {8 * n: n <= most for n in (first, 4 * first)}
    while n := following(found, 8):
        assert n not in found and n % 8 == 0
        found[n] = n <= 8 * most
        assert len(found) < 25
    fits = max((n for n, does in found.items() if does), default=0)
    over = min(n for n, does in found.items() if not does)
    assert fits <= 8 * most < over
    assert over - fits <= max(8, fits / 8)


@pytest.mark.parametrize(
    ("found", "then"),
    [
        ({}, None),  # nothing ran: nothing is known
        ({128: True}, 256),
        ({128: True, 256: True, 512: False}, 384),
        ({128: False}, 64),
        ({128: True, 136: False}, None),
    ],
)
def test_what_is_tried_next(found: dict[int, bool], then: int | None) -> None:
    assert following(found, 8) == then


def attention(way: str, ms: float, **numbers: float) -> Row:
    return Row("32,768 tokens, causal", way, {"both ms": ms, **numbers})


ROWS = [
    attention("one GPU, equal work", 9.0),
    attention("auto: ring(2)", 10.0, share=0.9, **{"predicted ms": 12.1}),
    attention("Ulysses()", 9.5, share=0.947),
    attention("torch context_parallel, cuDNN, allgather", 14.0),
    attention("torch context_parallel, flash, alltoall", 13.0),
    Row("Llama, 8 layers, 131,072 tokens", "mosaic.parallelize", {"of ideal": 0.96}),
    Row("every method, four masks", "against float64", {"x plain's error": 1.3}, right=True),
    Row("a rank killed in step 3, p = 4", "left with [1, 1, 1]", {"said after s": float("nan")}),
    Row("table, 150,000 rows, float32, forward", "4 ranks", {"s": 4.4, "GiB": 1.2}),
    Row("table, 150,000 rows, float32, forward", "1 ranks", {"s": 19.0, "GiB": 4.3}),
    Row("table, 1,000,000 rows, bfloat16, forward", "4 ranks", {"GiB": 5.0, "TFLOP/s": 250.0}),
    Row("attention's kernel, 4 x 11 heads of 24", "forward, bfloat16", {"TFLOP/s": 270.0}),
    Row("whole Llama, 1,048,576 tokens", "ring", {"step s": 400.0, "tokens/s/GPU": 320.0}),
]


def test_targets() -> None:
    found = {str(target): target.is_missed for target in targets(ROWS, 4)}
    assert found == {
        "32,768 tokens, causal, auto's share of one GPU: 0.9, asked for >= 0.9": False,
        "32,768 tokens, causal, torch's best in times of auto: 1.3, asked for >= 1.33": True,
        "32,768 tokens, causal, auto in times of the best: 1.053, asked for <= 1.05": True,
        "32,768 tokens, causal, auto's predicted / measured: 1.21, asked for >= 0.8 and <= 1.2": (
            True
        ),
        "Llama, 8 layers, 131,072 tokens, of the ideal: 0.96, asked for >= 0.95": False,
        "every method, four masks, errors: 1.3, asked for <= 1.2": True,
        "a rank killed in step 3, p = 4, said after: nan, asked for <= 60": True,
        "table, 150,000 rows, float32, forward, memory in parts of one rank's: 0.2791, "
        "asked for <= 0.27": True,
        "table, 150,000 rows, float32, forward, seconds: 4.4, asked for <= 4.5": False,
        "table, 1,000,000 rows, bfloat16, forward, of the kernel's rate: 0.9259, "
        "asked for >= 0.9": False,
    }


def test_the_whole_model_is_judged_on_eight() -> None:
    assert [str(target) for target in targets(ROWS[-1:], 8)] == [
        "whole Llama, 1,048,576 tokens, seconds of a step: 400, asked for <= 380"
    ]


#: Of two ranks: in case 0 the second fails and the first hangs; fresh ones go on with case 1, where
#: the failure that was of case 0 is told again, late.
RANKS = """
import os, sys, time
second, first = os.environ["RANK"] == "1", int(sys.argv[-1])
def tell(text):
    print("@" + text, flush=True)
if second:
    time.sleep(0.3)
    tell('["failed", [0, "OutOfMemoryError: no room"]]')
else:
    tell(f'["begin", {first}]')
    if first == 1:
        time.sleep(1)
        tell('["row", {"case": "one", "way": "ran", "numbers": {}, "words": "", "right": null}]')
        tell('["end", 1]')
time.sleep(60)
"""


def test_a_rank_that_fails_where_another_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_runner, "GRACE", 0.2)
    rows: list[Row] = []
    cases = [Case(name, lambda setting: iter(()), 30) for name in ("zero", "one")]
    begin = time.monotonic()
    Runner([sys.executable, "-c", RANKS], rows.append).run(Group("g", cases, 2, 1), begin + 40)
    assert [(row.case, row.way, row.words, row.right) for row in rows] == [
        ("zero", "", "OutOfMemoryError: no room", False),
        ("one", "ran", "", None),
    ]
    assert time.monotonic() - begin < 20
