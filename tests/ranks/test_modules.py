"""The eager modules and ``mosaic.attention`` on real ranks, in float64, against one process:
outputs, and gradients of inputs and parameters."""

from __future__ import annotations

import module_jobs as jobs
import pytest
import torch


def check(answers: list[dict[str, float]], tol: float = 1e-10) -> None:
    wrong = {
        f"rank {rank}: {case}": error
        for rank, errors in enumerate(answers)
        for case, error in errors.items()
        if not error < tol
    }
    assert answers[0] and not wrong, dict(list(wrong.items())[:8])


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("job", ["functional", "multi_axis", "cross", "two_axes", "plain_modules"])
def test_equals_one_process(ranks, job: str, p: int) -> None:
    check(ranks(p).run(getattr(jobs, job), p))


def test_dropout_is_the_same_for_every_backend_and_p(ranks) -> None:
    (want,) = ranks(1).run(jobs.dropout, 1)
    for p in (2, 4):
        for got in ranks(p).run(jobs.dropout, p):
            torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(got[:-1], got[:1].expand_as(got[:-1]), rtol=0, atol=1e-12)
            torch.testing.assert_close(got[-1], want[-1], rtol=0, atol=1e-12)
    assert (want[0] - want[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("compiler", [None, "aot_eager", "mosaic"])
def test_a_model_with_other_layers(ranks, compiler: str | None) -> None:
    check(ranks(2).run(jobs.block, 2, compiler))
