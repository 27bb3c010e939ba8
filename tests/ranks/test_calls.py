"""Calls that Dynamo runs eagerly or in pieces: right, or where gradients are shares refused."""

from __future__ import annotations

import call_jobs as jobs
import pytest
import torch
from compare import assert_close, compare_gradients
from expecttest import assert_expected_inline

import mosaic


def test_what_is_cut_may_run_eagerly_or_in_pieces(ranks) -> None:
    for off in ranks(2).run(jobs.eager_runs, 2):
        assert len(off) == 10 and max(off.values()) < 1e-12, off


def test_whole_tensors_may_run_eagerly_and_it_is_said(ranks) -> None:
    for said in ranks(2).run(jobs.whole_and_eager, 2):
        assert said == [
            "the compiled function ran eagerly, unsharded: torch.compiler.set_stance('force_eager')"
        ]


def test_fsdp_with_flat_parameters_is_not_sharded_and_it_is_said(ranks) -> None:
    for said in ranks(2).run(jobs.under_fsdp, 2):
        assert len(said) == 1 and said[0].startswith("the compiled function ran eagerly, unsharded")


def test_parameters_alone_give_shares(ranks) -> None:
    want = jobs.shares_of_blocks(0)
    for got in ranks(2).run(jobs.shares_of_blocks, 2):
        compare_gradients(want, got, 1e-10)


def test_shares_that_would_not_add_up_are_refused(ranks) -> None:
    said = ranks(2).run(jobs.refused_shares, 2)[0]
    assert_expected_inline(
        said["turned"],
        """\
the program returns parameter w or a view of it, and gradients are shares: what comes back for it is a whole gradient
  tests/ranks/call_jobs.py:LINE in turned
    return w.t()
  fix  return a copy (w.clone()), or leave gradients whole""",  # noqa: E501
    )
    assert said["itself"].startswith("the function returns a parameter or a view of it")
    assert said["break"].startswith("the graph breaks, and gradients are shares")
    assert_expected_inline(
        said["ddp"],
        """\
gradients are shares, and DistributedDataParallel averages them: they would be 2 times too small
  ranks  shares of [0, 1], average over [0, 1]
  fix    leave gradients whole (gradients="whole"): the average of equal ones is right; or give it a process_group of the data-parallel ranks, and sum along the other axis""",  # noqa: E501
    )
    assert_expected_inline(
        said["fsdp"],
        """\
gradients are shares, and fully_shard averages them: they would be 2 times too small
  ranks  shares of [0, 1], average over [0, 1]
  fix    leave gradients whole (gradients="whole"): the average of equal ones is right; or call set_gradient_divide_factor on the wrapped modules, with the number of data-parallel ranks""",  # noqa: E501
    )


def test_shares_under_fsdp_that_does_not_divide(ranks) -> None:
    want = jobs.shares_that_are_summed(0)
    for got in ranks(2).run(jobs.shares_that_are_summed, 2):
        for i, (one, other) in enumerate(zip(want, got, strict=True)):
            assert_close(f"gradient {i}", other, one, 1e-10)


@pytest.mark.parametrize("kind", [jobs.ViewOfInput, jobs.TwoLayouts])
def test_outputs_that_share_memory_stay_cut(ranks, kind: type) -> None:
    n = 2 if kind is jobs.TwoLayouts else 7
    want = jobs.outputs_that_stay_cut(0, kind, n)
    for got in ranks(3).run(jobs.outputs_that_stay_cut, 3, kind, n):
        compare_gradients(want, got, 1e-10)


def test_outputs_stay_cut_over_a_break(ranks) -> None:
    for kind, off in ranks(2).run(jobs.outputs_over_a_break, 2):
        assert kind == "ShardedTensor" and off < 1e-12


@pytest.mark.parametrize("inside", [True, False])
def test_ddp_is_one_graph(ranks, inside: bool) -> None:
    want = jobs.under_ddp(0, inside)
    for got in ranks(2).run(jobs.under_ddp, 2, inside):
        assert (got["graphs"], got["axis"]) == ([2], ["tokens"])
        assert_close("loss", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


@pytest.mark.parametrize("how", ["module", "function"])
def test_another_compile_does_not_take_it_in(ranks, how: str) -> None:
    want = jobs.Attend()(jobs.random(7)) * 2
    for got in ranks(2).run(jobs.nested, 2, how):
        assert_close("what the outer function gives", got, want, 1e-10)


@pytest.mark.parametrize("inner", [jobs.Attend(), jobs.Attend().forward])
def test_compiled_twice_is_refused(inner) -> None:
    assert_expected_inline(
        jobs.said(lambda: torch.compile(jobs.compiled(inner), backend="eager")),
        """\
a function that is compiled with backend='mosaic' is compiled with another one
  fix  compile it once; Mosaic's own inner compiler is Inductor""",
    )


def test_compiled_in_place_with_parts_is_refused() -> None:
    """A compiled function that calls the module would go past ``Module.compile``."""
    spec = mosaic.ShardingSpec(gradients="shares")
    model = jobs.Attend()
    assert_expected_inline(
        jobs.said(lambda: model.compile(backend="mosaic", options={"spec": spec})),
        """\
a module is compiled in place, and gradients are shares: another torch.compile around it would not see that, and run it as plain PyTorch
  fix  model = torch.compile(model, ...) in place of model.compile(...)""",  # noqa: E501
    )
    model.compile(backend="mosaic", options={"spec": mosaic.ShardingSpec()})
