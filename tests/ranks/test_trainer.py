"""``mosaic.integrations.prepare``: every number that a Trainer logs is that of one process."""

from __future__ import annotations

import pytest

for _name in ("accelerate", "peft", "trl", "datasets"):
    pytest.importorskip(_name)

import trainer_jobs as jobs
from compare import compare_gradients
from sampling import FULL

#: Losses and Trainer's own sums are float32.
CLOSE = 1e-6
SHORT = {"max_steps": 3, "eval_steps": 3}
CHECKPOINTED = {"gradient_accumulation_steps": 2, "activation_checkpointing": True}
SMOOTHED = {"label_smoothing_factor": 0.1}


def assert_logged(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    """The same names in the same order, and the same numbers."""
    assert [list(log) for log in got] == [list(log) for log in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=CLOSE, abs=1e-12), theirs


@pytest.mark.parametrize(
    "p, dp, options",
    [
        (2, 1, {"texts": (24, 7), **SHORT}),
        FULL(2, 1, {"texts": (24, 7)}),
        FULL(2, 2, {}),
        FULL(3, 1, SHORT),
        FULL(2, 2, CHECKPOINTED | SHORT),
        FULL(2, 1, {"how": "shard"}),
        FULL(2, 2, {"how": "shard"} | CHECKPOINTED),
        FULL(2, 1, SMOOTHED | SHORT),
        FULL(2, 1, {"lora": True, "texts": (24, 7)}),
        FULL(2, 2, {"lora": True}),
    ],
)
def test_trainer(ranks, p: int, dp: int, options: dict) -> None:
    """Loss, norm of gradients, learning rate, tokens, evaluation's loss and metrics; with FSDP2,
    LoRA, accumulation and checkpointing."""
    [want] = ranks(1).run(jobs.trained, 0, dp, **{**options, "how": "alone"})
    for got in ranks(p * dp).run(jobs.trained, p, dp, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.full
def test_last_batches_are_those_of_replicas(ranks) -> None:
    """Where the texts do not fill the last batches, accelerate fills them up: as it does without
    Mosaic on as many processes as there are replicas."""
    options = {"texts": (23, 7), "max_steps": 7, "eval_steps": 3}
    want, _ = ranks(2).run(jobs.trained, 0, 2, how="plain", **options)
    for got in ranks(4).run(jobs.trained, 2, 2, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.parametrize(
    "p, dp, options",
    [
        (2, 1, {"max_steps": 2, "eval_steps": 2}),
        FULL(2, 2, {}),
        FULL(2, 1, SMOOTHED),
        FULL(2, 2, {"how": "shard"}),
        FULL(2, 1, {"lora": True}),
    ],
)
def test_sft_with_packing(ranks, p: int, dp: int, options: dict) -> None:
    """TRL's loss in chunks; with label smoothing that of whole logits. Entropy, accuracy and
    tokens, too."""
    [want] = ranks(1).run(jobs.tuned, 0, dp, **{**options, "how": "alone"})
    for got in ranks(p * dp).run(jobs.tuned, p, dp, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.parametrize(
    "options", [FULL({}), {"how": "shard"}, FULL({"lora": True})], ids=["whole", "shard", "lora"]
)
def test_checkpoints(ranks, tmp_path, options: dict) -> None:
    """A run goes on from a checkpoint as if nothing had been, and plain transformers reads it."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    [want] = ranks(1).run(jobs.resumed, 0, alone, **{**options, "how": "alone"})
    for got in ranks(2).run(jobs.resumed, 2, together, **options, timeout=900):
        assert_logged(got["once"], want["once"])
        assert_logged(got["again"], want["again"])
        assert got["again"][2:4] == pytest.approx(got["once"][2:4], rel=CLOSE)
        compare_gradients(want["weights"], got["weights"], 1e-6)
