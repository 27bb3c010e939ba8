"""Many lengths, few programs, where blocks are compiled one by one (``mosaic.parallelize``): each
tensor between them has its own length, and what a block gives is what one process gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from block_length_jobs import masked
from compare import assert_close, compare_gradients
from length_jobs import ids_and_labels, run_lengths
from sampling import FULL
from test_lengths import LENGTHS, MODELS, THIRTY, spec_of

import mosaic

#: A model, the ranks, how it is parallelized, lengths, and how many programs that takes. The first
#: call cuts its inputs evenly: a causal block that gets them so is compiled once more. FSDP2 makes
#: units of embeddings, too.
MANY = [
    ("gpt", 1, "blocks", LENGTHS, 2),
    ("gpt", 2, "blocks, fsdp", (37, 20, 50), 5),
    ("gpt", 3, "blocks", THIRTY, 2),
    ("gpt", 2, "blocks, checkpoint", LENGTHS, 3),
    ("llama", 2, "blocks", THIRTY, 2),
    ("llama", 4, "blocks, fsdp", LENGTHS, 6),
    # A mask of sizes, under checkpoints, is compiled for each length, and said.
    ("llama_padded", 3, "blocks, checkpoint", LENGTHS, 6),
    ("encoder", 4, "blocks", LENGTHS, 2),
]
FEW = [
    ("encoder", 3, "blocks", (37, 50), 1),  # the last rank has none of 37 rows
    ("llama_padded", 2, "blocks", (37, 50), 2),
]


@pytest.mark.parametrize("name, p, how, lengths, compiles", [*FEW, *(FULL(*x) for x in MANY)])
def test_models(ranks, name: str, p: int, how: str, lengths: Sequence[int], compiles: int) -> None:
    build, batch, inputs, mask = MODELS[name]
    run = partial(run_lengths, build, batch, lengths)
    want = run()
    for got in ranks(p).run(run, spec_of(inputs), p, how, timeout=600):
        assert got["compiles"] == compiles
        assert got["masks"] == {mask}
        compare_steps(got, want)


@pytest.mark.parametrize(
    "kind, compiles, said",
    [
        FULL("", 2, ""),
        ("flips", 3, "flip mixes rows [tests/ranks/block_length_jobs.py"),
        FULL("divides", 2, ""),
        FULL("breaks", 3, "the graph breaks"),
    ],
)
def test_masks_made_between_blocks(caplog, kind: str, compiles: int, said: str) -> None:
    """Of positions, by a program that holds for any length. Blocks without a form for padding are
    compiled for each length, and said."""
    run = partial(run_lengths, partial(masked, kind), ids_and_labels, (37, 20, 33))
    want = run()
    with caplog.at_level(logging.WARNING):
        got = run(spec_of(MODELS["gpt"][2]), 1, "blocks")
    mosaic.get_context().shutdown()
    torch._dynamo.reset()
    texts = "".join(r.message for r in caplog.records if "buckets" in r.message)
    assert said in texts
    assert bool(said) == bool(texts)
    assert got["compiles"] == compiles
    assert got["masks"] == {"causal, window 9"}
    compare_steps(got, want)


def compare_steps(got: dict, want: dict) -> None:
    for n, step in got["steps"].items():
        assert_close(f"loss of {n}", step["loss"], want["steps"][n]["loss"], 1e-12)
        compare_gradients(want["steps"][n]["gradients"], step["gradients"], 1e-11)
