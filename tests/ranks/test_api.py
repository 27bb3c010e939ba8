"""What users do beside the plain call, on real ranks, against one process."""

from __future__ import annotations

from functools import partial

import pytest
import rank_api_jobs as jobs
import torch
from cases import gpt
from compare import assert_close, compare_gradients
from contract_cases import Encoder, Mean, built
from expecttest import assert_expected_inline
from model_jobs import run_model
from sampling import FULL

from mosaic.passes import OPTIONAL


def same(got: dict, want: dict, tol: float = 1e-10) -> None:
    assert_close("loss", got["loss"], want["loss"], tol)
    compare_gradients(want["gradients"], got["gradients"], tol)


@pytest.mark.parametrize("p", [1, 3])
def test_outputs_may_stay_cut(ranks, p: int) -> None:
    want = jobs.whole_outputs()
    for got in ranks(p).run(jobs.sharded_outputs, p):
        same(got, want)
        assert_close("logits", got["logits"], want["logits"], 1e-10)
        assert got["layout"].startswith("37=")


def test_some_outputs_may_stay_cut(ranks) -> None:
    first, second, (refused,) = ranks(2).run(jobs.some_outputs, 2)[0].values()
    assert (first, second) == (["ShardedTensor", "Tensor"], ["Tensor", "Tensor"])
    assert_expected_inline(
        refused,
        """\
the function has no output 'logits'
  outputs  tuple
  fix      name one that it gives: outputs={"logits": "shards"}, or by number""",
    )


@pytest.mark.parametrize("name", ["gpt", FULL("vit")])
def test_gradients_may_stay_shares(ranks, name: str) -> None:
    build = jobs.cases.CASES[name][0]
    want = run_model(build, None)
    for got in ranks(3).run(jobs.shares, 3, name):
        same(got, want)


@pytest.mark.parametrize("what", ["class", "instance", "function"])
def test_the_decorator(ranks, what: str) -> None:
    want = run_model(partial(built, Mean), None)
    want["gradients"].pop("input 0")
    for got in ranks(2).run(jobs.decorated, 2, what):
        same(got, want)


def test_every_length_is_right(ranks) -> None:
    want = jobs.three_lengths_plain()
    for got in ranks(2).run(jobs.three_lengths, 2):
        for mine, theirs in zip(got, want, strict=True):
            same(mine, theirs)


def test_inference(ranks) -> None:
    want = jobs.inference(0)
    for got in ranks(3).run(jobs.inference, 3):
        same(got, want)
        assert_close("again", got["again"], want["again"], 1e-10)


def test_ambient_autocast(ranks) -> None:
    """bfloat16 sums round, so the bound is bfloat16's."""
    want = jobs.ambient_autocast(0)
    for got in ranks(3).run(jobs.ambient_autocast, 3):
        same(got, want, 3e-2)


@pytest.mark.full
def test_a_batch_of_one_gpt_on_four(ranks) -> None:
    build = partial(gpt, batch=1)
    want = run_model(build, None)
    for got in ranks(4).run(run_model, build, {"inner": "eager"}, 4):
        same(got, want)
    assert torch.isfinite(want["loss"])


@pytest.mark.parametrize("padded", [FULL(False), True])
def test_the_fused_encoder_layer(ranks, padded: bool) -> None:
    want = jobs.fused_encoder(0, padded)
    for got in ranks(3).run(jobs.fused_encoder, 3, padded):
        same(got, want)


def test_the_fused_encoder_layer_is_cut() -> None:
    import mosaic

    model, (x,), _ = built(Encoder)
    with torch.no_grad():
        plan = mosaic.explain(model.eval(), x, sp_size=3)
    assert [a.method for a in plan.attentions] == ["all_gather"] * 3


def test_inputs_may_arrive_cut(ranks) -> None:
    want = jobs.whole_steps([13, 20])
    for got in ranks(3).run(jobs.arriving_shards, 3, [13, 20]):
        for mine, theirs in zip(got, want, strict=True):
            same(mine, theirs)


def test_a_part_that_the_user_made(ranks) -> None:
    (want,) = jobs.whole_steps([13])
    for got in ranks(3).run(jobs.parts_of_the_user, 3):
        same(got, want)


def test_a_float_attribute_with_dynamic_sizes(ranks) -> None:
    """Of a float attribute Dynamo makes an input, and of an error of torch's own a graph break."""
    want = jobs.dynamic_norm(0)
    for got in ranks(2).run(jobs.dynamic_norm, 2):
        assert got.pop("cut") == [True]
        same(got, want)


@pytest.mark.parametrize(
    "off", [*(step.__name__ for step in OPTIONAL), FULL("overlap, analyze_masks")]
)
def test_programs_are_right_without_an_optional_pass(ranks, off: str) -> None:
    want = jobs.without_passes(0, "")
    for got in ranks(2).run(jobs.without_passes, 2, off):
        same(got, want)


def test_code_for_other_ranks_is_not_kept(ranks) -> None:
    for sizes, apart in ranks(3).run(jobs.other_ranks_later, 3):
        assert sizes == [1, 3]
        assert max(map(abs, apart)) < 1e-10


def test_shutdown_leaves_no_groups(ranks) -> None:
    """Their threads wake up all the time: hundreds of them halve the speed of a machine."""
    assert ranks(2).run(jobs.groups_left) == [(0, 0), (0, 0)]
