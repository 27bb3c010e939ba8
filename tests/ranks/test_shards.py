"""Inputs that arrive cut: a program sees their global length, and takes this rank's part."""

from __future__ import annotations

import pytest
import shard_jobs as jobs
from compare import assert_close, compare_gradients
from expecttest import assert_expected_inline
from sampling import FULL


@pytest.mark.parametrize("decide", [jobs.branch, jobs.loop, jobs.whole_number, jobs.first])
def test_python_decides_by_the_global_length(ranks, decide) -> None:
    """A branch, a loop, a text and a slice that 13 rows decide otherwise than 7 or 6."""
    assert max(ranks(2).run(jobs.decided, 2, decide)) < 1e-12


@pytest.mark.parametrize("n", [1, 2])
def test_parts_of_one_row_and_of_none(ranks, n: int) -> None:
    assert max(ranks(3).run(jobs.decided, 3, jobs.unchanged, n)) < 1e-12


def test_a_graph_break(ranks) -> None:
    assert max(ranks(2).run(jobs.broken, 2)) < 1e-12


def test_another_input_may_be_whole(ranks) -> None:
    assert max(ranks(2).run(jobs.beside_a_whole_one, 2)) < 1e-12


def test_cut_for_other_ranks(ranks) -> None:
    assert_expected_inline(
        ranks(2).run(jobs.refused_ranks, 2)[0],
        """\
a ShardedTensor is cut for 2 ranks, and mesh axis 'sp' has 1
  fix  make it after mosaic.init, and anew after another one""",
    )


def test_the_whole_inside_of_what_is_compiled(ranks) -> None:
    text = ranks(2).run(jobs.whole_inside, 2)[0]
    assert "x.full_tensor() inside of what is compiled, where every tensor is the whole one" in text
    assert "shard_jobs.py" in text


@pytest.mark.parametrize(
    "name", ["decided", "video", FULL("gpt"), FULL("llama"), FULL("table"), FULL("hf_llama")]
)
def test_models_that_take_parts(ranks, name: str) -> None:
    want, tol = jobs.model_on_parts(0, name), 1e-4 if name.startswith("hf_") else 1e-10
    for got in ranks(2).run(jobs.model_on_parts, 2, name):
        assert got["graphs"] == 1
        assert_close("loss", got["loss"], want["loss"], tol)
        compare_gradients(want["gradients"], got["gradients"], tol)


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_part_may_change_on_one_rank_only(ranks, zigzag: bool) -> None:
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
