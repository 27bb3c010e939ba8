"""Writes into tensors that share memory."""

from __future__ import annotations

import pytest
import view_jobs as jobs
from compare import assert_close
from expecttest import assert_expected_inline
from sampling import FULL


@pytest.mark.parametrize("p", [2, FULL(1), FULL(3), FULL(4)])
@pytest.mark.parametrize(
    "how, mode",
    [
        ("eager", "grad"), ("eager", "inference"), ("compiled", "grad"), ("inside", "grad"),
        FULL("eager", "no_grad"), FULL("compiled", "no_grad"), FULL("compiled", "inference"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("program", jobs.PROGRAMS, ids=lambda f: f.__name__)
def test_a_write_is_seen_by_all_that_share_memory(ranks, program, how, mode, p: int) -> None:
    check(ranks, program, how, mode, p)


@pytest.mark.parametrize("how", ["eager", FULL("compiled")])
@pytest.mark.parametrize("program", jobs.OF_MANY, ids=lambda f: f.__name__)
def test_a_write_to_one_of_many_views(ranks, program, how: str) -> None:
    for mode in ("no_grad", "inference"):
        check(ranks, program, how, mode, 2)


def check(ranks, program, how: str, mode: str, p: int) -> None:
    want = jobs.written(0, program, how, mode)
    for got in ranks(p).run(jobs.written, p, program, how, mode):
        for name, a, b in zip(("result", "gradient"), got, want, strict=False):
            assert_close(f"{name}, {mode}", a, b, 1e-12)


def test_a_view_that_is_whole(ranks) -> None:
    assert max(ranks(2).run(jobs.into_a_whole_view, 2)) == 0


def test_what_is_written_brings_its_history(ranks) -> None:
    (want,) = jobs.takes_a_history(0)
    for (got,) in ranks(2).run(jobs.takes_a_history, 2):
        assert_close("gradient", got, want, 0)


@pytest.mark.parametrize(
    "program", [jobs.expanded, jobs.turned_under_a_view, jobs.of_a_graph_that_shares]
)
def test_what_is_not_followed_is_refused(ranks, program) -> None:
    text = ranks(2).run(jobs.refused, 2, program)[0]
    assert "writes into a tensor that is cut, and shares memory" in text


def test_two_histories(ranks) -> None:
    text = ranks(2).run(jobs.refused, 2, jobs.two_histories)[0]
    assert "what has a gradient is written into a detached tensor" in text
    assert "view_jobs.py" in text and "z.mul_(x)" in text


def test_refused(ranks) -> None:
    assert_expected_inline(
        ranks(2).run(jobs.refused, 2, jobs.expanded)[0],
        """\
aten.add_.Tensor writes into a tensor that is cut, and shares memory in a way that is not followed
  sizes  [2, 4, 7, 6]
  fix    make a new tensor instead (torch.where, index_put, cat), or write before the view""",
    )
