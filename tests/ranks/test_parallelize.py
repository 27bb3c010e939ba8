"""``mosaic.parallelize``: after backward every parameter has the single-device gradient."""

from __future__ import annotations

import parallel_jobs as jobs
import pytest
from compare import assert_close, compare_gradients
from expecttest import assert_expected_inline
from sampling import FULL

#: What the units of a model send beside their attentions.
NOTHING: list[str] = []
SUMS = ["gradients of whole tensors, in backward"]
LOSS = ["sum of the losses", "sum over the axis"]  # in the graph, where that is the whole model


@pytest.mark.parametrize(
    "p, dp, how, breaks, options, sent",
    [
        (2, 2, "fsdp", False, {"micro": 2}, NOTHING),
        (2, 1, "fsdp", False, {"as_one": True}, LOSS),
        FULL(2, 2, "hsdp", False, {"as_one": True, "micro": 2}, LOSS),
        FULL(2, 1, "fsdp", True, {}, SUMS),
        FULL(3, 1, "fsdp", False, {"checkpoint": True}, NOTHING),
        FULL(2, 2, "hsdp", False, {"micro": 2}, NOTHING),
        FULL(2, 2, "ddp", False, {"micro": 2}, SUMS),
        FULL(4, 1, "none", True, {}, SUMS),
        FULL(2, 2, "fsdp", True, {"micro": 2}, SUMS),
        FULL(1, 2, "fsdp", False, {}, NOTHING),
        (1, 2, "hsdp", False, {"micro": 2}, NOTHING),
        FULL(1, 1, "fsdp", False, {}, NOTHING),
    ],
)
def test_three_steps(ranks, p: int, dp: int, how: str, breaks: bool, options: dict, sent) -> None:
    """Losses, norms of gradients, gradients and weights, with replicas and micro-batches."""
    want = jobs.trained(0, dp, how, breaks, micro=options.get("micro", 1))
    every = ranks(p * dp).run(jobs.trained, p, dp, how, breaks, **options)
    losses = [
        sum(found) / len(every) for found in zip(*(got["losses"] for got in every), strict=True)
    ]
    for mine, theirs in zip(losses, want["losses"], strict=True):
        assert_close("loss", mine, theirs, 1e-12)
    for got in every:
        assert got["sent"] == sent
        for mine, theirs in zip(got["norms"], want["norms"], strict=True):
            assert_close("norm", mine, theirs, 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        compare_gradients(want["weights"], got["weights"], 1e-10)


@pytest.mark.parametrize(
    "name, breaks, mask",
    [
        FULL("llama", False, "causal"),
        FULL("llama, padding", False, "causal, padding"),
        FULL("llama, padding", True, "causal, padding"),
        FULL("llama, packed", False, "causal, documents"),
        FULL("llama, packed", True, "causal, documents"),
        FULL("mistral", False, "causal, window 6"),
        ("mistral", True, "causal, window 6"),
        FULL("bert", False, "padding"),
        FULL("mixtral", False, "causal"),
    ],
)
def test_models_of_transformers(ranks, name: str, breaks: bool, mask: str) -> None:
    """Blocks are compiled one by one, and masks are made outside of them: no rank has one. Nor
    where every block breaks before its attention."""
    want = jobs.library(0, name)
    for got in ranks(2).run(jobs.library, 2, name, breaks):
        # The models compute their loss in float32; a mixtral is float32 all over.
        assert_close("loss", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-3 if name == "mixtral" else 1e-5)
        assert got["masks"] == [mask]
        assert got["gathered"] == got["squares"] == []
        if name != "bert":  # whose token types are a whole buffer, and so is their embedding
            assert got["whole"] == []


@pytest.mark.parametrize("p", [2, FULL(3), FULL(4)])
@pytest.mark.parametrize(
    "name, mask",
    [
        FULL("llama", "causal, documents"),
        FULL("llama, padding", "causal, padding"),
        ("llama, packed", "causal, documents"),
        FULL("mistral", "causal, window 6, documents"),
    ],
)
def test_models_of_transformers_compiled_whole(ranks, name: str, mask: str, p: int) -> None:
    """The model makes its masks, and breaks before each attention and each MLP."""
    want = jobs.library(0, name)
    for got in ranks(p).run(jobs.library, p, name, True, "whole"):
        assert_close("loss", got["loss"], want["loss"], 1e-5)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert got["masks"] == [mask]
        assert got["gathered"] == got["strips"] == []
        if name == "llama, packed":  # others make sines of whole positions in a graph by itself
            assert got["whole"] == []


@pytest.mark.full
def test_packed_texts_of_another_length(ranks) -> None:
    """Dynamo takes the second length as a symbol; what waits to be made is for one length."""
    want = jobs.lengths(0)
    for got in ranks(2).run(jobs.lengths, 2):
        for mine, theirs in zip(got, want, strict=True):
            assert_close("loss", mine, theirs, 1e-5)


@pytest.mark.parametrize("p, how, kind", [(3, "fsdp", "DTensor"), FULL(2, "none", "Tensor")])
def test_what_is_whole_beside_what_is_cut(ranks, p: int, how: str, kind: str) -> None:
    """A unit's parameters on whole tensors give as much on every rank; and a parameter that eager
    code uses beside what is cut has a gradient that is plain."""
    want = jobs.two_streams(0)
    for got in ranks(p).run(jobs.two_streams, p, how):
        assert_close("loss", got["loss"], want["loss"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert got["kinds"] == {kind}


def test_what_a_rank_holds_and_sends(ranks) -> None:
    """Of 4 blocks under FSDP2 on 4 ranks, in a step after the first two."""
    alone = jobs.held(0)
    for got in ranks(4).run(jobs.held, 4):
        assert got["kept"] <= 1.15 / 4 * alone["kept"]
        for what in ("parameters", "optimizer"):
            assert got[what] <= 1.01 / 4 * alone[what], what
        assert got["compiled again"] == 0
        assert got["sent"] == {
            "c10d::_allgather_base_": 12,  # FSDP2: each of 6 units, forward and backward
            "c10d::_reduce_scatter_base_": 6,
            "_c10d_functional::all_gather_into_tensor": 8,  # attention: keys, forward and backward
            "c10d::allgather_into_tensor_coalesced_": 8,  # what torch makes of these
            "_c10d_functional::all_to_all_single": 4,  # their gradients
            "c10d::alltoall_base_": 4,
            "_c10d_functional::all_reduce": 2,  # the loss: a sum and a count
            "c10d::allreduce_": 2,
            "_c10d_functional::wait_tensor": 14,
            "c10d::allgather_": 1,  # inputs are compared
        }


def test_mixed_precision(ranks) -> None:
    want = jobs.mixed(0)
    for got in ranks(2).run(jobs.mixed, 2):
        compare_gradients(want, got, 3e-2)


def test_refused(ranks) -> None:
    said = ranks(2).run(jobs.refused)[0]
    assert_expected_inline(
        said["no list"],
        """\
Linear has no list of repeated modules
  fix  say what is compiled: blocks=[model.first, model.second], or blocks=[model]""",
    )
    assert_expected_inline(
        said["no part"],
        """\
Tanh is among the blocks, and no part of the model
  fix  pass modules of the model: blocks=list(model.layers)""",
    )
    assert_expected_inline(
        said["no module"],
        """\
a builtin_function_or_method is no nn.Module
  fix  pass a model""",
    )
    assert_expected_inline(
        said["no argument"],
        """\
the model has no argument 'idz'
  arguments  ids, labels
  fix        name dims of its arguments: inputs={'ids': 'batch tokens'}""",
    )
    assert_expected_inline(
        said["none given"],
        """\
the call gives none of the inputs that have names
  names  labels
  fix    name dims of arguments that it gives: inputs={'ids': 'batch tokens'}""",
    )
    assert said["other data"].startswith(
        "ranks of one sequence-parallel group were given different data: argument ids"
    )
    assert_expected_inline(
        said["other dims"],
        """\
ids has other dims than its names
  names  tokens
  sizes  [2, 13]
  fix    give each dim a name, and _ to those that do not matter""",
    )
