"""Models of transformers in many lengths, block by block: their own losses and gradients."""

from __future__ import annotations

from functools import partial

import pytest
from compare import assert_close, compare_gradients
from family_jobs import BUILD
from length_jobs import run_lengths, texts
from sampling import FULL
from test_lengths import TEXTS, spec_of


@pytest.mark.parametrize(
    "name, masks, tolerance",
    [
        FULL("qwen3", {"causal"}, 1e-11),
        FULL("gpt_neox", {"causal"}, 1e-11),
        # Its norms are float32: with norms in float64 its gradients are off by 2e-16.
        FULL("gemma3", {"causal", "causal, window 6"}, 1e-6),
    ],
)
def test_two_lengths(ranks, name: str, masks: set[str], tolerance: float) -> None:
    run = partial(run_lengths, BUILD[name], texts, (37, 50))
    want = run()
    (got,) = ranks(1).run(run, spec_of(TEXTS), 1, "blocks", timeout=600)
    assert got["compiles"] == len(masks)
    assert got["masks"] == masks
    for n, step in got["steps"].items():
        assert_close(f"loss of {n}", step["loss"], want["steps"][n]["loss"], 1e-12)
        compare_gradients(want["steps"][n]["gradients"], step["gradients"], tolerance)
