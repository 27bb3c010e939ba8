"""Attentions written by hand, compiled for real ranks, against plain PyTorch."""

from __future__ import annotations

import handwritten_jobs as jobs
import pytest
from handwritten import ATTENTIONS

SAMPLE = [
    "einsum_heads_behind",
    "alibi_baddbmm",
    "causal_padding_low",
    "row_bias",
    "gpt_oss",
    "softcap_of_padding",
    "softcap_and_distances",
]


def test_equals_one_process(ranks) -> None:
    check(ranks(2).run(jobs.differences, 2, SAMPLE))


@pytest.mark.full
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_all_equal_one_process(ranks, p: int) -> None:
    check(ranks(p).run(jobs.differences, p, list(ATTENTIONS), timeout=600))


def check(answers: list[dict[str, float]]) -> None:
    wrong = {name: d for answer in answers for name, d in answer.items() if not d < 1e-10}
    assert not wrong, wrong
