"""A Trainer as people use it: evaluated before it trains, its best model loaded, predicting."""

from __future__ import annotations

from typing import Any

import pytest
from compare import assert_close, assert_logged, compare_gradients
from sampling import FULL

jobs = pytest.importorskip("trainer_jobs", reason="needs accelerate and peft")

UNCLIPPED = {"max_grad_norm": 0.0, "eval_accumulation_steps": 1}
GROUPED = {"ragged": True, "train_sampling_strategy": "group_by_length"}
GROUPED |= {"include_num_input_tokens_seen": "non_padding"}


@pytest.mark.parametrize(
    "p, dp, options",
    [
        (2, 1, UNCLIPPED),
        FULL(2, 1, GROUPED),
        FULL(2, 2, {}),  # an evaluation first must not leave DistributedDataParallel out,
        FULL(3, 1, {"fsdp_config": {}}),  # nor parameters that FSDP2 has made whole for it
        FULL(2, 2, {"lora": True}),
    ],
)
def test_uses(ranks, tmp_path, p: int, dp: int, options: dict) -> None:
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    [want] = ranks(1).run(jobs.used, 0, dp, alone, **options)
    for got in ranks(p * dp).run(jobs.used, p, dp, together, **options, timeout=900):
        assert_same(got, want)


@pytest.mark.full
def test_tokens_of_each_replica_alone(ranks, tmp_path) -> None:
    """average_tokens_across_devices=False: what accelerate has on as many processes as there are
    replicas."""
    options = {"average_tokens_across_devices": False}
    want, _ = ranks(2).run(jobs.used, 0, 2, str(tmp_path / "plain"), how="plain", **options)
    for got in ranks(4).run(jobs.used, 2, 2, str(tmp_path / "together"), **options, timeout=900):
        assert_same(got, want)


def test_best_model_that_a_rank_does_not_find(ranks) -> None:
    for said in ranks(2).run(jobs.unseen):
        assert said.startswith("ShardingError: ranks [1] do not find the weights of the best")


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Weights are Adam's: it divides gradients that are next to nothing by themselves."""
    assert_logged(got["logged"], want["logged"])
    for name in ("predictions", "labels"):
        assert_close(name, got[name], want[name], 1e-6)
    compare_gradients(want["weights"], got["weights"], 1e-5)
