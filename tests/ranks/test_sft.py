"""TRL's SFTTrainer on ranks that share a sequence logs what one process logs."""

from __future__ import annotations

import pytest
from compare import assert_logged
from sampling import FULL

jobs = pytest.importorskip("sft_jobs", reason="needs trl")

SMOOTHED = {"label_smoothing_factor": 0.1, "max_steps": 4, "eval_steps": 4}


@pytest.mark.parametrize(
    "p, dp, options",
    [
        (2, 1, {"max_steps": 2, "eval_steps": 2}),
        FULL(2, 2, {}),
        FULL(2, 1, SMOOTHED),
        FULL(2, 2, {"how": "shard"}),
        FULL(2, 1, {"how": "fsdp_config", "bf16": False, "max_steps": 2, "eval_steps": 2}),
        FULL(2, 1, {"lora": True}),
        FULL(2, 1, {"texts": "ragged", "pad_to_multiple_of": 64}),
        FULL(2, 1, {"texts": "ragged", "max_steps": 3, "eval_steps": 3}),
    ],
)
def test_sft_with_packing(ranks, p: int, dp: int, options: dict) -> None:
    """TRL's loss in chunks; with label smoothing that of whole logits. Entropy, accuracy and
    tokens, too."""
    [want] = ranks(1).run(jobs.tuned, 0, dp, **{**options, "how": "alone"})
    for got in ranks(p * dp).run(jobs.tuned, p, dp, **options, timeout=900):
        assert_logged(got, want)
