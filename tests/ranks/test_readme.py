"""The README's blocks for training scripts run as they stand, on 2 ranks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from compare import compare_gradients
from sampling import FULL

jobs = pytest.importorskip("readme_jobs", reason="needs accelerate and peft")

BLOCKS = ("plain PyTorch", "FSDP2", "transformers' Trainer", "TRL's SFTTrainer")
PLAIN, FSDP2, TRAINER, SFT = BLOCKS
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")


def test_every_block_is_run() -> None:
    assert list(jobs.blocks()) == [
        "plain PyTorch",
        "FSDP2",
        "transformers' Trainer",
        "TRL's SFTTrainer",
    ]


@pytest.mark.parametrize(
    "name",
    [
        FULL(PLAIN),
        FULL(FSDP2),
        TRAINER,
        pytest.param(SFT, marks=[pytest.mark.full, needs_trl]),
    ],
)
def test_blocks(ranks, name: str) -> None:
    """Weights are those of one process. (Its losses are float32.)"""
    [want] = ranks(1).run(jobs.weights, name, alone=True)
    for got in ranks(2).run(jobs.weights, name, alone=False, timeout=900):
        compare_gradients(want, got, 1e-5)
