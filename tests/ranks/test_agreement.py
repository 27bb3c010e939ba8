"""Ranks that disagree are told so, before a collective hangs or a wrong number comes out."""

from __future__ import annotations

import re
from collections.abc import Iterator

import agreement_jobs as jobs
import pytest
from expecttest import assert_expected_inline
from rank_pool import RankError, RankPool

import mosaic


@pytest.fixture
def two() -> Iterator[RankPool]:
    """Fresh ranks: after a disagreement they count their compiles differently."""
    pool = RankPool(2, timeout=120)
    yield pool
    pool.close()


def test_another_length(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.other_length, 2)[0],
        """\
ranks [1] compiled another program than rank 0
  differs  graph, plan
  fix      give every rank the same model, spec, versions and modes (no_grad, autocast, train or eval), and inputs of the same sizes""",  # noqa: E501
    )


def test_another_spec(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.other_spec, 2)[1],
        """\
ranks [0] compiled another program than rank 1
  differs  plan, spec
  fix      give every rank the same model, spec, versions and modes (no_grad, autocast, train or eval), and inputs of the same sizes""",  # noqa: E501
    )


def test_other_data(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.other_data, 2)[0],
        """\
ranks of one sequence-parallel group were given different data: argument x
  ranks  [1] differ from rank 0
  fix    seed your sampler by mosaic.get_context().dp_rank, so that ranks of one group see the same batch""",  # noqa: E501
    )


def test_other_parameters(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.other_parameters, 2)[1],
        """\
ranks of one sequence-parallel group were given different data: parameter or buffer w.bias
  ranks  [0] differ from rank 1
  fix    seed the ranks alike before building the model, or broadcast its state_dict""",
    )


def test_other_data_later(two: RankPool) -> None:
    (steps, text), _ = two.run(jobs.at_step_three, 2)
    assert steps == 2
    assert_expected_inline(
        text,
        """\
ranks of one sequence-parallel group were given different data: argument x
  ranks  [1] differ from rank 0
  run    3 of this graph
  fix    seed your sampler by mosaic.get_context().dp_rank, so that ranks of one group see the same batch""",  # noqa: E501
    )


def test_a_gpu_is_waited_for_when_it_has_its_work(two: RankPool) -> None:
    """After the first run, whose comparison is waited for before it, and the second, which follows
    another one than the first did."""
    (steps, text, happened), _ = two.run(jobs.at_step_three_of_a_gpu, 2)
    assert steps == 2
    assert "different data: argument x" in text and "3 of this graph" in text
    assert happened == ["wait", "run", "wait", "run", "run", "wait"]


def test_another_batch_of_a_parallelized_model(two: RankPool) -> None:
    """It is told in the same call, and no loss comes out."""
    for steps, text, losses in two.run(jobs.another_batch_of_a_model, 2):
        assert (steps, len(losses)) == (2, 2)
        assert "different data: argument ids" in text


def test_first_looks_at_the_first_run_only(two: RankPool) -> None:
    spec = mosaic.ShardingSpec(check_inputs="first")
    assert two.run(jobs.at_step_three, 2, spec) == [(4, "no error")] * 2


def test_another_length_that_all_have_compiled(two: RankPool) -> None:
    first, second = two.run(jobs.another_compiled_length, 2)
    assert_expected_inline(
        first,
        """\
ranks of one sequence-parallel group run different graphs: their arguments have other sizes, their modes differ, or their code took another way
  rank 0  x [2, 13, 8]
  rank 1  x [2, 11, 8]
  fix     every rank must run the same program with inputs of the same sizes, in the same modes (no_grad, autocast, train or eval); seed your sampler by mosaic.get_context().dp_rank, so that ranks of one group see the same batch""",  # noqa: E501
    )
    assert "rank 0" in second and "rank 1" in second


def test_lengths_in_turn(two: RankPool) -> None:
    """Each follows the other, and the first run follows none."""
    assert two.run(jobs.alternating_lengths, 2) == [3, 3]


def test_a_rank_that_is_gone(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.one_is_gone, 2)[0],
        """\
ranks [1] are gone: they did not compile this graph
  ranks  this is rank 0 of [0, 1]
  fix    look for what they said before they ended; every rank must run the same program, and as often""",  # noqa: E501
    )


def test_a_rank_that_is_late_is_waited_for(two: RankPool) -> None:
    (said, logged), (other, _) = two.run(jobs.one_is_late, 2)
    assert (said, other) == ("no error", "no error")
    assert set(logged) == {"rank 0 waits for ranks [1] to compile this graph"}


def test_other_methods_of_an_eager_attention(two: RankPool) -> None:
    for text in two.run(jobs.other_methods, 2):
        assert_expected_inline(
            text,
            """\
the ranks ask for different attentions
  rank 0  method = Ring(mesh='sp', stages='auto', grad_dtype=None), band = full, scale = None, dropout = 0.0
  rank 1  method = Ulysses(mesh='sp'), band = full, scale = None, dropout = 0.0
  fix     call mosaic.attention, and mosaic's modules, with the same arguments on all ranks""",  # noqa: E501
        )


def test_ranks_that_wait_for_each_other(two: RankPool) -> None:
    first, second = two.run(jobs.each_waits_for_another_thing, 2)
    assert_expected_inline(
        first,
        """\
rank 0 waits for the others to compile this graph, and rank 1 for them to compare the sizes of its shards
  fix  every rank must run the same program with inputs of the same sizes, in the same modes (no_grad, autocast, train or eval)""",  # noqa: E501
    )
    assert second.startswith("rank 1 waits for the others to compare the sizes of its shards")


def test_one_rank_under_no_grad(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.one_without_gradients, 2)[0],
        """\
ranks [1] compiled another program than rank 0
  differs  modes
  fix      give every rank the same model, spec, versions and modes (no_grad, autocast, train or eval), and inputs of the same sizes""",  # noqa: E501
    )


def test_other_modes_that_all_have_compiled(two: RankPool) -> None:
    said = two.run(jobs.other_compiled_modes, 2)
    title = "ranks of one sequence-parallel group run different graphs"
    assert all(text.startswith(title) for text in said), said


def test_one_rank_compiles_and_the_other_runs(two: RankPool) -> None:
    """The one that compiles is told so; the other one is in a collective until that one is gone."""
    words = (
        "rank 1 waits for the others to compile this graph, and rank 0 runs one that is compiled"
    )
    with pytest.raises(RankError, match=words):
        two.run(jobs.one_compiles_another, 2)


def test_the_store_does_not_fill_up(two: RankPool) -> None:
    first, *others = two.run(jobs.keys_are_deleted, 2)[0]
    assert set(others) == {first}


def test_a_rank_that_fails(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.one_fails, 2)[0],
        """\
rank 1 could not compile this graph
  reason  no tensor argument of the compiled function is called 'y'
  arguments  x
  fix        use these names (or paths such as batch['ids']) as keys of inputs
  fix     see that rank's own error: what one rank cannot compile none runs""",
    )


def test_a_failure_that_was_caught_is_past(two: RankPool) -> None:
    assert two.run(jobs.late_after_a_failure, 2) == ["no error", "no error"]


def test_other_collectives(two: RankPool) -> None:
    """How many there were before is not the same with every torch."""
    text = two.run(jobs.other_collectives, 2)[0]
    assert_expected_inline(
        re.sub(r"(collective|number) \d+", r"\1 N", text),
        """\
the ranks' forward graphs do not start the same collectives
  rank 0, collective N  all_reduce(float64[2, 8], sum) over sp, number N tests/contract_cases.py:180
  rank 1, collective N  nothing
  fix                    this is a bug in Mosaic: please report the program; without the op at that line it may work""",  # noqa: E501
    )


def test_a_rank_that_fails_late(two: RankPool) -> None:
    assert_expected_inline(
        two.run(jobs.one_fails_late, 2)[0],
        """\
rank 1 could not compile this graph
  reason  the C++ compiler is missing
  fix     see that rank's own error: what one rank cannot compile none runs""",
    )
