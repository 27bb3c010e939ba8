"""Inputs that arrive cut: a program that its local length would decide is refused on every rank."""

from __future__ import annotations

import pytest
import shard_jobs as jobs
from compare import assert_close, compare_gradients
from expecttest import assert_expected_inline
from sampling import FULL, sampled


def test_a_branch_that_one_rank_takes(ranks) -> None:
    told, found = ranks(2).run(jobs.refusal, 2, jobs.branch)
    assert_expected_inline(
        found,
        """\
the program depends on the length of an input that arrives cut: on one device it would take another way
  shard_jobs.py:50 in branch
    if x.shape[1] > 6:  # of 13 rows, rank 0 has 7 and rank 1 has 6
  condition  n <= 6, with n the length
  lengths    6 on this rank, 13 on one device
  fix        pass whole inputs (inputs_are="whole"), or let the model do the same whatever the length is""",  # noqa: E501
    )
    assert_expected_inline(told.splitlines()[0], """rank 1 could not compile this graph""")
    assert found.split("\n", 1)[1] in told


def test_a_branch_that_no_rank_takes(ranks) -> None:
    assert_expected_inline(
        ranks(2).run(jobs.refusal, 2, jobs.other_branch)[0],
        """\
the program depends on the length of an input that arrives cut: on one device it would take another way
  shard_jobs.py:56 in other_branch
    if x.shape[1] > 10:
  condition  n <= 10, with n the length
  lengths    7 on this rank, 13 on one device
  fix        pass whole inputs (inputs_are="whole"), or let the model do the same whatever the length is""",  # noqa: E501
    )


def test_a_loop_over_the_length(ranks) -> None:
    for text in ranks(2).run(jobs.refusal, 2, jobs.loop):
        assert "for step in range(x.shape[1]):" in text, text
    assert_expected_inline(
        text,
        """\
the program depends on the length of an input that arrives cut: on one device it would take another way
  shard_jobs.py:62 in loop
    for step in range(x.shape[1]):
  condition  n == 6, with n the length
  lengths    6 on this rank, 13 on one device
  fix        pass whole inputs (inputs_are="whole"), or let the model do the same whatever the length is""",  # noqa: E501
    )


def test_a_length_made_text(ranks) -> None:
    for text in ranks(2).run(jobs.refusal, 2, jobs.whole_number):
        assert 'x * len(f"{x.shape[1]}")' in text, text


def test_a_slice_that_takes_less_of_the_whole(ranks) -> None:
    for text in ranks(2).run(jobs.refusal, 2, jobs.first):
        assert "return x[:, :8]" in text, text


def test_a_range_that_the_user_gave(ranks) -> None:
    assert_expected_inline(
        ranks(2).run(jobs.refusal, 2, jobs.bounded)[0],
        """\
the program depends on the length of an input that arrives cut: on one device it would take another way
  condition  2 <= n <= 9, with n the length
  lengths    7 on this rank, 13 on one device
  fix        pass whole inputs (inputs_are="whole"), or let the model do the same whatever the length is""",  # noqa: E501
    )


def test_a_graph_break(ranks) -> None:
    text = ranks(2).run(jobs.refusal_of_a_break, 2)[0]
    assert_expected_inline(
        text,
        """\
the graph breaks, and inputs arrive cut: what Python sees there is not the whole
  tests/ranks/shard_jobs.py:43 in forward
    torch._dynamo.graph_break()
  reason  Call to `torch._dynamo.graph_break()`
  fix     remove the break (torch.compile(..., fullgraph=True) names its reason), compile the model inside of its wrapper (DDP(torch.compile(model))), or use whole inputs, outputs and gradients""",  # noqa: E501
    )


def test_a_part_that_is_too_short(ranks) -> None:
    assert_expected_inline(
        ranks(2).run(jobs.refusal, 2, jobs.unchanged, 2)[0],
        """\
this rank's part of x is too short: Dynamo builds lengths 0 and 1 into the program
  sizes  [2, 1, 8], cut in dim 1
  fix    use fewer ranks, or pass whole inputs (inputs_are="whole")""",
    )


def test_an_input_of_which_nothing_is_said(ranks) -> None:
    text = ranks(2).run(jobs.refusal_of_another_input, 2)[0]
    assert_expected_inline(
        text,
        """\
dim 1 of y has the local length of an input that arrives cut, and nothing says that it is cut too
  sizes  [2, 7, 8]
  fix    name that dim in inputs={...}, or, if it is that long by chance, call torch._dynamo.mark_static(y, 1)""",  # noqa: E501
    )


@pytest.mark.parametrize("name", sampled(jobs.MODELS, ("gpt", "llama", "table")))
def test_models_whose_guards_hold(ranks, name: str) -> None:
    said = ranks(2).run(jobs.captured_lengths, 2, name)
    assert said == [LENGTHS[name]] * 2


LENGTHS = {
    "decided": "1 inputs of {13}",
    "gpt": "2 inputs of {37}",
    "llama": "2 inputs of {37}",
    "table": "1 inputs of {37}",
    "video": "1 inputs of {13}",
    "hf_llama": "3 inputs of {37}",
}


@pytest.mark.parametrize("name", ["decided", "video", FULL("gpt"), FULL("llama"), "hf_llama"])
def test_models_that_take_parts(ranks, name: str) -> None:
    want, tol = jobs.model_on_parts(0, name), 1e-4 if name.startswith("hf_") else 1e-10
    for got in ranks(2).run(jobs.model_on_parts, 2, name):
        assert_close("loss", got["loss"], want["loss"], tol)
        compare_gradients(want["gradients"], got["gradients"], tol)


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_length_may_change_on_one_rank_only(ranks, zigzag: bool) -> None:
    """Of 13 and of 14 rows, rank 0 has 7."""
    for off in ranks(2).run(jobs.lengths, 2, [13, 14, 16, 13], zigzag):
        assert max(off) < 1e-12, off


def test_floats_under_dynamic(ranks) -> None:
    """``LayerNorm.eps`` and a float attribute: capture once stopped at their ``item``, which Dynamo
    took for a graph break, and attention ran on parts."""
    factors = [0.5, 0.7, 0.5]
    want = jobs.floats_on_parts(0, factors)
    for got in ranks(2).run(jobs.floats_on_parts, 2, factors):
        for ours, theirs in zip(got, want, strict=True):
            assert_close("loss", ours["loss"], theirs["loss"], 1e-10)
            compare_gradients(theirs["gradients"], ours["gradients"], 1e-10)
