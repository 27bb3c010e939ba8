"""The loss of a head is that of one process, and no rank makes the logits."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, compare_gradients
from loss_jobs import (
    STEPS,
    WITH,
    WITHOUT,
    gpt2,
    llama,
    read_late,
    run,
    run_library,
    run_parallelized,
    tied,
    weighted,
    without_init,
)
from sampling import FULL

FEW = [(loss, 3 if loss is tied else 2) for loss in WITHOUT]
MORE = [FULL(loss, p) for loss in WITHOUT for p in (1, 2, 3, 4) if (loss, p) not in FEW]


def check(ranks, loss, p: int) -> list[dict]:
    want = run(loss, None)
    every = ranks(p).run(run, loss, p)
    for got in every:
        assert_close("loss", got["loss"], want["loss"], 1e-12)
        if want["logits"] is not None:
            assert_close("logits", got["logits"], want["logits"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-12)
    return every


@pytest.mark.parametrize("loss, p", [*FEW, *MORE])
def test_no_logits_are_kept(ranks, loss, p: int) -> None:
    """Those that are returned wait to be made."""
    for got in check(ranks, loss, p):
        assert not got["kept"]
        assert got["notes"]
        assert p == 1 or got["kind"] == ("NoneType" if got["logits"] is None else "DeferredTensor")


@pytest.mark.parametrize("loss", WITH)
def test_logits_that_are_read_are_made(ranks, loss) -> None:
    for got in check(ranks, loss, 2):
        assert not got["notes"]


def test_bfloat16(ranks) -> None:
    """As close to float64 as with logits."""
    exact = run(weighted, None)["gradients"]
    plainly = run(weighted, None, torch.bfloat16)["gradients"]
    for got in ranks(2).run(run, weighted, 2, torch.bfloat16):
        for name, want in exact.items():
            errors = [(x[name].double() - want).norm() for x in (got["gradients"], plainly)]
            assert errors[0] <= 1.5 * errors[1] + 1e-3 * want.norm(), name


@pytest.mark.parametrize("build", [llama, FULL(gpt2)])
def test_library_models(ranks, build) -> None:
    want = run_library(build, None)
    for got in ranks(2).run(run_library, build, 2):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
        assert torch.equal(got["best"], want["best"])
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert got["notes"]


def test_one_process_without_init(ranks) -> None:
    """GPT-2's graph breaks: what goes on is no ShardedTensor, as nobody shares it."""
    want = run_library(gpt2, None, STEPS[:1])
    (got,) = ranks(1).run(without_init, gpt2)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
    compare_gradients(want["gradients"], got["gradients"], 1e-5)


def test_logits_are_not_read_behind_a_write_to_their_head(ranks) -> None:
    for text in ranks(2).run(read_late, 2):
        assert "behind a write to what they are made of" in text


@pytest.mark.parametrize(
    "p, options",
    [
        FULL(2, {}),
        (2, {"fully_shard": True}),
        FULL(3, {"fully_shard": True, "tied": True}),
        (2, {"tied": True}),
    ],
)
def test_blocks_of_a_parallelized_model(ranks, p: int, options: dict) -> None:
    want = run_parallelized(None, tied=options.get("tied", False))
    for got in ranks(p).run(run_parallelized, p, **options):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
        compare_gradients(want["gradients"], got["gradients"], 1e-5)
        assert got["calls"] == 2
        assert got["kept"] is None
        assert "before backward and optimizer.step()" in got["refused"]
