"""Many lengths, few programs: what a bucket's program gives is what one process gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from compare import assert_close, compare_gradients
from length_jobs import (
    ALONE,
    OPS,
    encoder,
    gpt,
    ids_and_labels,
    llama,
    llama_with_its_loss,
    other_lengths,
    padded_texts,
    rows,
    run_lengths,
    run_ops,
    sentences,
    table,
    texts,
)
from sampling import FULL

import mosaic

TEXTS = dict.fromkeys(("input_ids", "labels"), "batch tokens")
#: A model, its batches, the names of their dims, how the plan calls its mask.
MODELS = {
    "llama": (llama, texts, TEXTS, "causal"),
    "llama_padded": (
        llama,
        padded_texts,
        {**TEXTS, **dict.fromkeys(("attention_mask", "position_ids"), "batch tokens")},
        "causal, padding",
    ),
    "gpt": (gpt, ids_and_labels, dict.fromkeys(("ids", "labels"), "batch tokens"), "causal"),
    "encoder": (
        encoder,
        sentences,
        dict.fromkeys(("ids", "padding"), "batch tokens"),
        "bias of keys",
    ),
    "table": (table, rows, {"x": "batch tokens _", "y": "batch tokens"}, ""),
}
#: Four of one bucket, two of another; 64 is not padded.
LENGTHS = (37, 64, 50, 20, 33, 31)
THIRTY = range(33, 63)


def spec_of(inputs: dict[str, str], buckets: Any = "powers") -> dict[str, Any]:
    axes = {"tokens": "auto"}
    return {"spec": mosaic.ShardingSpec(inputs=inputs, axes=axes, buckets=buckets)}


MANY = [(name, p, LENGTHS, 2) for name in MODELS for p in (1, 2, 3, 4)]
MANY += [(name, p, THIRTY, 1) for name, p in (("llama", 2), ("gpt", 3), ("encoder", 2))]
FEW = [("gpt", 2, (37, 20, 50), 2), ("encoder", 3, (37, 50), 1)]


@pytest.mark.parametrize("name, p, lengths, compiles", [*FEW, *(FULL(*case) for case in MANY)])
def test_models(ranks, name: str, p: int, lengths: Sequence[int], compiles: int) -> None:
    build, batch, inputs, mask = MODELS[name]
    run = partial(run_lengths, build, batch, lengths)
    want = run()
    for got in ranks(p).run(run, spec_of(inputs), p, timeout=600):
        assert got["compiles"] == compiles
        assert got["masks"] == {mask}
        for n, step in got["steps"].items():
            expected = want["steps"][n]
            assert_close(f"loss of {n}", step["loss"], expected["loss"], 1e-12)
            compare_gradients(expected["gradients"], step["gradients"], 1e-11)
            for x, y in zip(step["outputs"], expected["outputs"], strict=True):
                assert x.is_contiguous() == y.is_contiguous()
                assert_close(f"output of {n}", x, y, 1e-11)


def test_a_step_of_transformers(ranks) -> None:
    """Two lengths of one bucket, with the model's own loss, which it takes in float32."""
    run = partial(run_lengths, llama_with_its_loss, texts, (37, 50))
    want = run()
    for got in ranks(2).run(run, spec_of(TEXTS), 2):
        assert got["compiles"] == 1
        assert got["masks"] == {"causal"}
        for n, step in got["steps"].items():
            assert_close(f"loss of {n}", step["loss"], want["steps"][n]["loss"], 1e-6)
            compare_gradients(want["steps"][n]["gradients"], step["gradients"], 1e-5)


@pytest.mark.parametrize("how", ["fsdp", FULL("parallelize")])
def test_parallelize(ranks, how: str) -> None:
    """The model as one graph: its logits stay cut, and each length has parts of its own."""
    run = partial(run_lengths, gpt, ids_and_labels, (37, 64, 50))
    want = run()
    for got in ranks(2).run(run, spec_of(MODELS["gpt"][2]), 2, how):
        assert got["compiles"] == 1
        for n, step in got["steps"].items():
            expected = want["steps"][n]
            compare_gradients(expected["gradients"], step["gradients"], 1e-11)
            for x, y in zip(step["outputs"], expected["outputs"], strict=True):
                assert_close(f"output of {n}", x, y, 1e-11)


def test_parallelize_of_a_model_that_is_recomputed_is_refused() -> None:
    mosaic.init(sp_size=1)
    model = gpt()
    with pytest.raises(mosaic.ShardingError, match="names, which"):
        spec = spec_of(MODELS["gpt"][2])["spec"]
        mosaic.parallelize(model, spec, blocks=[model], checkpoint=True)
    mosaic.get_context().shutdown()


@pytest.mark.full
def test_dropout_is_what_one_mosaic_rank_draws(ranks) -> None:
    run = partial(run_lengths, partial(gpt, dropout=0.3), ids_and_labels, (37, 50))
    options = spec_of(MODELS["gpt"][2])
    (want,) = ranks(1).run(run, options, 1)
    for got in ranks(3).run(run, options, 3):
        for n, step in got["steps"].items():
            compare_gradients(want["steps"][n]["gradients"], step["gradients"], 1e-11)


SOME = ["mean_of_all", "last", "by_hand", "flip"]


@pytest.mark.parametrize("names", [SOME, FULL([name for name in OPS if name not in SOME])])
@pytest.mark.parametrize("p", [2, FULL(1), FULL(3)])
def test_ops(ranks, names: list[str], p: int) -> None:
    """Those that mix rows, of lengths with and without padding; what has no exact form is compiled
    for each length."""
    spec = mosaic.ShardingSpec(inputs={"x": "_ rows _"}, axes={"rows": "auto"}, buckets=(8,))
    lengths = (5, 8)
    want = run_ops(names, None, lengths, 1)
    for got in ranks(p).run(run_ops, names, {"spec": spec}, lengths, p, timeout=600):
        for name in names:
            found = got[name]
            assert found["compiles"] == (len(lengths) if name in ALONE else 1), name
            for n, step in found["steps"].items():
                compare_gradients(want[name]["steps"][n], step, 1e-12)


@pytest.mark.parametrize(
    "name, said",
    [
        ("flip", "flip mixes rows"),
        ("fewer_rows_than_the_bucket", "has fewer rows than the bucket"),
        ("half", "computes a number of the length"),
        ("last_three", "takes rows that may be padding"),
    ],
)
def test_what_is_compiled_by_itself_is_said(ranks, caplog, name: str, said: str) -> None:
    spec = mosaic.ShardingSpec(inputs={"x": "_ rows _"}, axes={"rows": "auto"}, buckets=(8,))
    with caplog.at_level(logging.WARNING):
        run_ops([name], {"spec": spec}, (5,), 1)
    mosaic.get_context().shutdown()
    torch._dynamo.reset()
    (text,) = {r.message for r in caplog.records if "buckets" in r.message}
    assert said in text
    assert "length_jobs.py" in text


def test_ranks_with_other_lengths(ranks) -> None:
    """In one bucket they run one program, and would send what does not fit."""
    for text in ranks(2).run(other_lengths, spec_of(MODELS["gpt"][2])):
        assert "ranks of one sequence-parallel group run different graphs" in text
        assert "ids [2, 37]" in text
        assert "ids [2, 38]" in text


@pytest.mark.parametrize("buckets", ["fibonacci", (), (0, 8), ("8",), 64])
def test_what_is_no_bucket(buckets: Any) -> None:
    with pytest.raises(mosaic.ShardingError, match="are no lengths"):
        spec_of({"ids": "batch tokens"}, buckets)


def test_buckets_are_of_one_axis() -> None:
    with pytest.raises(mosaic.ShardingError, match="none with a name is cut"):
        mosaic.ShardingSpec(buckets="powers")
