"""The pool of ranks that the other tests of this folder stand on."""

from __future__ import annotations

import time

import jobs
import pytest
import torch
from rank_pool import RankError


@pytest.mark.parametrize("p", [1, 3])
def test_all_reduce(ranks, p):
    for total in ranks(p).run(jobs.sum_of_ranks, dtype=torch.float64):
        assert torch.equal(total, torch.full((3,), p * (p - 1) / 2, dtype=torch.float64))


def test_a_backward_before_and_after_the_fork(ranks):
    x = torch.randn(64, 64)
    expected = jobs.gradient_of_square(x)
    for actual in ranks(2).run(jobs.gradient_of_square, x):
        assert torch.allclose(actual, expected)


def test_an_error_names_its_rank_and_the_pool_goes_on(ranks):
    with pytest.raises(RankError) as failure:
        ranks(3).run(jobs.fail_on, 1)
    text = str(failure.value)
    assert text.startswith("rank 1 of 3 failed:\nTraceback")
    assert "in fail_on" in text and "ValueError: this rank is unhappy" in text
    assert [t[0].item() for t in ranks(3).run(jobs.sum_of_ranks, torch.int64)] == [3, 3, 3]


def test_a_hang_times_out(ranks):
    begin = time.monotonic()
    with pytest.raises(RankError) as failure:
        ranks(2).run(jobs.hang_on, 1, timeout=1.0)
    assert str(failure.value) == "no answer within 1 s from ranks [1] of 2"
    assert time.monotonic() - begin < 20


def test_one_job_may_ask_for_another_mesh_than_the_last(ranks):
    places = ranks(4).run(jobs.mesh_places, 4)
    assert [p[:4] for p in places] == [(0, 1, rank, 4) for rank in range(4)]
    assert [p[4].item() for p in places] == [6, 6, 6, 6]
    places = ranks(4).run(jobs.mesh_places, 2)
    assert [p[:4] for p in places] == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert [p[4].item() for p in places] == [1, 1, 5, 5]


def test_a_job_hears_what_an_earlier_one_was_told(ranks):
    for _ in range(2):
        assert ranks(2).run(jobs.warned_once) == [["once"]] * 2
