"""Attentions that transformers writes out (``attn_implementation="eager"``), against one process.

``docs/transformers.md`` has the table of which are raised, and why others are not.
"""

from __future__ import annotations

import eager_jobs as jobs
import pytest
from compare import assert_close, compare_gradients
from eager_forms import FORMS
from sampling import sampled

import mosaic


def check(ranks, name: str, p: int, method: str | mosaic.Method = "ring") -> dict:
    want = jobs.run(name, 0)
    every = ranks(p).run(jobs.run, name, p, method, timeout=300)
    tol = FORMS[name].tol
    for got in every:
        assert_close("logits", got["logits"], want["logits"], tol)
        compare_gradients(want["gradients"], got["gradients"], tol)
    return every[0]


SHOWN = ("gpt_oss",)


@pytest.mark.parametrize("name", sampled(FORMS, [name for name in FORMS if name not in SHOWN]))
def test_equals_one_process(ranks, name: str) -> None:
    got = check(ranks, name, 2)
    assert got["attentions"] == FORMS[name].masks
