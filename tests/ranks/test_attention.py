"""Attention on real ranks: every method, mask and cut, forward and every gradient, in float64."""

from __future__ import annotations

import attention_jobs as jobs
import pytest
from sampling import FULL


def check(answers: list[dict[str, float]], tol: float = 1e-10) -> None:
    wrong = {
        f"rank {r}: {case}": e
        for r, errors in enumerate(answers)
        for case, e in errors.items()
        if not e < tol
    }
    assert not wrong, (
        f"{len(wrong)} of {len(answers[0]) * len(answers)} wrong: {dict(list(wrong.items())[:8])}"
    )


@pytest.mark.parametrize("p", [1, FULL(2), 3, FULL(4)])
def test_equals_one_process(ranks, p: int) -> None:
    """A sample of the matrix: method x mask x KV heads x cut x lengths."""
    check(ranks(p).run(jobs.all_cases, timeout=120))


@pytest.mark.full
@pytest.mark.parametrize("p", [4, 8])
def test_chunks_of_many_ranks_are_views(ranks, p: int) -> None:
    check(ranks(p).run(jobs.combed_cases, timeout=240))


@pytest.mark.full
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_whole_matrix(ranks, p: int) -> None:
    check(ranks(p).run(jobs.all_cases, True, timeout=900))


@pytest.mark.parametrize("p", [1, FULL(2), 4])
def test_dropout_draws_what_one_process_draws(ranks, p: int) -> None:
    check(ranks(p).run(jobs.dropout_cases))


@pytest.mark.parametrize("p, every", [FULL(1, True), FULL(2, True), (3, False), FULL(4, True)])
def test_sinks_are_counted_once(ranks, p: int, every: bool) -> None:
    check(ranks(p).run(jobs.sinks_cases, every, timeout=240))


@pytest.mark.parametrize(
    "inner, which", [("eager", "few"), FULL("eager", "others"), FULL("inductor", "one")]
)
def test_lowered_after_autograd(ranks, inner: str, which: str) -> None:
    answers = ranks(3).run(jobs.lowered_cases, inner, which, timeout=150)
    check([{case: result.error for case, result in answer.items()} for answer in answers])
    for case, result in answers[0].items():
        assert not any(t.startswith("mosaic.") for ts in result.targets.values() for t in ts), case
        computed = [shape for op, shape in result.saved if op != "placeholder"]
        # views of k and v; heads come back as q, k, v and out of the exchange
        more = 2 if case.startswith("local") else 3 if case.startswith("Ulysses") else 0
        more += case.startswith("Ulysses") and "tiles" in case  # and the heads of the table
        assert len(computed) == 2 + more, f"{case} keeps more than out and lse: {computed}"
    for results in zip(*(answer.values() for answer in answers), strict=True):
        assert starts(results[0]) == starts(results[1]) == starts(results[2])


def starts(result: jobs.Compiled) -> dict[str, list[str]]:
    """The collectives of each graph, in order."""
    return {
        name: [t for t in targets if t.startswith("_c10d") and "wait" not in t]
        for name, targets in result.targets.items()
    }
