"""Programs of many graphs: compiled whole, block by block, or not; with graph breaks or without."""

from __future__ import annotations

import crossing_jobs as jobs
import pytest
import torch
from compare import assert_close, compare_gradients
from sampling import FULL, sampled


@pytest.mark.parametrize("p", [FULL(1), 2, FULL(3), FULL(4)])
@pytest.mark.parametrize("how, breaks", [("blocks", True), ("blocks", False), ("whole", True)])
@pytest.mark.parametrize("cut", [True, FULL(False)])
def test_what_is_cut_stays_cut(ranks, p: int, how: str, breaks: bool, cut: bool) -> None:
    want = jobs.decoder(0, how, breaks)
    for got in ranks(p).run(jobs.decoder, p, how, breaks, cut):
        assert_close("loss", got["loss"], want["loss"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert got["gathered"] == got["whole"] == []
        if cut:  # every graph takes parts
            assert set(got["axes"]) == {"sp"}


@pytest.mark.parametrize("name", jobs.USES)
def test_what_users_do_with_one(ranks, name: str) -> None:
    """Eager code around what is compiled: each use gives what it gives on one device."""
    want = jobs.used(0, name)
    for got in ranks(2).run(jobs.used, 2, name):
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_close(f"{name} {number}", a, b, 1e-2 if name == "autocast" else 1e-10)


WORDS = {
    "causal": "causal", "documents": "causal, documents", "padded": "causal, padding",
    "added": "causal", "triangle": "causal",
}  # fmt: skip


@pytest.mark.parametrize("p", [FULL(1), 2, FULL(3), FULL(4)])
@pytest.mark.parametrize("kind", sampled(jobs.MASKS, ("causal", "added", "padded")))
def test_masks_cross_a_break_as_what_they_are_made_of(ranks, p: int, kind: str) -> None:
    want = jobs.masks(0, kind)
    for got in ranks(p).run(jobs.masks, p, kind):
        assert_close("loss", got["loss"], want["loss"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert torch.equal(got["mask"], want["mask"])
        if p > 1 and kind in WORDS:
            assert got["words"] == {WORDS[kind]}
            assert got["strips"] == []
