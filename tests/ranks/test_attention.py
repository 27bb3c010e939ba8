"""Attention on real ranks: every method, mask and cut, forward and every gradient, in float64."""

from __future__ import annotations

import attention_jobs as jobs
import pytest


def check(answers: list[dict[str, float]], tol: float = 1e-10) -> None:
    wrong = {f"rank {r}: {case}": e for r, errors in enumerate(answers) for case, e in errors.items() if not e < tol}
    assert not wrong, f"{len(wrong)} of {len(answers[0]) * len(answers)} wrong: {dict(list(wrong.items())[:8])}"


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["ring", "all_gather", "local"])
def test_equals_one_process(ranks, method: str, p: int) -> None:
    check(ranks(p).run(jobs.all_cases, (method,), timeout=60))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_dropout_draws_what_one_process_draws(ranks, p: int) -> None:
    check(ranks(p).run(jobs.dropout_cases))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_lowered_after_autograd(ranks, inner: str) -> None:
    answers = ranks(3).run(jobs.lowered_cases, inner, timeout=150)
    check([{case: result.error for case, result in answer.items()} for answer in answers])
    for case, result in answers[0].items():
        for targets in result.targets.values():
            assert not any(target.startswith("mosaic.") for target in targets), case
        computed = [shape for op, shape in result.saved if op != "placeholder"]
        assert len(computed) <= 2, f"{case} keeps more than out and lse: {computed}"


def test_every_rank_issues_the_same_collectives(ranks) -> None:
    answers = ranks(3).run(jobs.lowered_cases, "eager", timeout=60)
    for results in zip(*(answer.values() for answer in answers), strict=True):
        orders = [
            {name: [t for t in targets if t.startswith("_c10d")] for name, targets in r.targets.items()}
            for r in results
        ]
        starts = [{n: [t for t in o if "wait" not in t] for n, t_o in order.items() for o in [t_o]} for order in orders]
        assert starts[0] == starts[1] == starts[2]
