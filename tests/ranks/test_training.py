"""Training on ranks is training on one: the loss of every step, dropout, and what is kept."""

from __future__ import annotations

import pytest
import training_jobs as jobs
from compare import compare_gradients
from sampling import FULL

DROPOUT = {"dropout": 0.1, "layers": 1}


@pytest.mark.parametrize("p", [2, FULL(4)])
def test_the_loss_curve_is_that_of_one_process(ranks, p: int) -> None:
    expected = jobs.train(None, steps=30)
    assert expected["losses"][-1] < expected["losses"][0]
    for answer in ranks(p).run(jobs.train, p, steps=30):
        off = [abs(a - b) for a, b in zip(answer["losses"], expected["losses"], strict=True)]
        assert max(off) < 1e-8, off
        for ours, theirs in zip(answer["gradients"], expected["gradients"], strict=True):
            compare_gradients(theirs, ours, tol=1e-8)


@pytest.mark.full
def test_a_rank_keeps_its_share_of_the_activations(ranks) -> None:
    (alone,) = ranks(1).run(jobs.kept_bytes, 1)
    for kept in ranks(4).run(jobs.kept_bytes, 4):
        assert 0.2 * alone < kept <= 0.27 * alone, (kept, alone)


@pytest.mark.parametrize("p", [2, FULL(4)])
def test_dropout_is_that_of_one_rank(ranks, p: int) -> None:
    (alone,) = ranks(1).run(jobs.train, 1, steps=3, **DROPOUT)
    plain = jobs.train(None, steps=3, layers=1)
    assert abs(alone["losses"][0] - plain["losses"][0]) > 1e-6  # something was dropped
    for answer in ranks(p).run(jobs.train, p, steps=3, **DROPOUT):
        for step, (a, b) in enumerate(zip(answer["losses"], alone["losses"], strict=True)):
            assert abs(a - b) < 1e-12, f"step {step}: {a} is not {b}"
        for ours, theirs in zip(answer["gradients"], alone["gradients"], strict=True):
            compare_gradients(theirs, ours, tol=1e-12)


@pytest.mark.parametrize(("policy", "again"), [("first_product", 0), ("save_nothing", 1)])
def test_a_selective_checkpoint_keeps_what_its_policy_says(ranks, policy: str, again: int) -> None:
    policy = getattr(jobs, policy)
    want = jobs.products_in_backward(None, policy)
    for got in ranks(2).run(jobs.products_in_backward, 2, policy):
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        assert got["again"] == again
