"""A recurrence of which nothing is known is right, and said once."""

from __future__ import annotations

import pytest
from compare import assert_close, compare_gradients
from loop_jobs import run_loop

SAID = {
    "loop": ("a loop takes rows one by one", "the graph stays whole on every rank: ", "loop_jobs"),
    "loop and attention": ("a loop takes rows one by one", "it runs whole on every rank: "),
    "attention and loop": ("a loop takes rows one by one", "each row is sent to every rank"),
    "lstm": ("ran eagerly, unsharded", "nn.LSTM"),
    "rows": ("no attention in a whole program",),
}


@pytest.mark.parametrize("name", SAID)
def test_it_is_right_and_said(ranks, name: str) -> None:
    want = run_loop(name, 0)
    for got in ranks(2).run(run_loop, name, 2):
        assert_close("result", got["result"], want["result"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-12)
        (text,) = got["said"]
        assert all(part in text for part in SAID[name]), text
