"""Attentions that transformers writes out (``attn_implementation="eager"``), against one process.

``docs/transformers.md`` has the table of what they become, and why some stay whole.
"""

from __future__ import annotations

from functools import cache

import eager_jobs as jobs
import pytest
from compare import assert_close, compare_gradients
from eager_forms import FORMS
from sampling import sampled

import mosaic

#: The others take longer; ``handwritten.py`` has their forms.
SHOWN = ("distilbert", "falcon, alibi")
alone = cache(jobs.run)


def check(ranks, name: str, p: int, method: str | mosaic.Method = "ring") -> dict:
    want, tol = alone(name, 0), FORMS[name].tol
    every = ranks(p).run(jobs.run, name, p, method, timeout=300)
    for got in every:
        assert_close("logits", got["logits"], want["logits"], tol)
        compare_gradients(want["gradients"], got["gradients"], tol)
    return every[0]


@pytest.mark.parametrize("name", sampled(FORMS, [name for name in FORMS if name not in SHOWN]))
def test_equals_one_process(ranks, name: str) -> None:
    assert sorted(check(ranks, name, 2)["attentions"]) == sorted(FORMS[name].masks)


@pytest.mark.full
@pytest.mark.parametrize(
    "p, method, planned",
    [
        (2, "ulysses", "ulysses(2)"),
        (3, "ring", "ring(stages=2)"),
        (3, "all_gather", "all_gather"),
        (4, mosaic.Mesh2D(2, 2), "mesh2d(2, 2)"),
        (4, mosaic.Hierarchical(2, "ulysses"), "hierarchical(2, ulysses, ring)"),
    ],
)
def test_sinks_by_other_methods(ranks, p: int, method: str | mosaic.Method, planned: str) -> None:
    assert check(ranks, "gpt_oss", p, method)["methods"] == {planned}
