"""Every row of the table, whole in float64 and cut along every dim of every operand: the same
result, the same gradients, and no more sent than was declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from rank_pool import RankPool
from rule_case import Case
from rule_cases import CASES
from rule_costs import COSTS
from rule_jobs import captured, check, costs, costs_of_my_share, drawn

from mosaic.graph.ops import POINTWISE, key
from mosaic.partition.table import CREATED, TABLE, Rule, named_dims, rule

NAMES = list(CASES)
CHUNK = 40
CHUNKS = [NAMES[i : i + CHUNK] for i in range(0, len(NAMES), CHUNK)]


@pytest.fixture(scope="module")
def rule_ranks() -> Iterator[Callable[[int], RankPool]]:
    """Pools of their own: forked now, they find every sample captured already."""
    for name in NAMES:
        captured(name)
    pools = {p: RankPool(p) for p in (2, 3)}
    yield pools.__getitem__
    for pool in pools.values():
        pool.close()


def free(case: Case) -> str:
    return " ".join("." * len(given.shape) or "_" for given in case.inputs)


# --- what is declared ---------------------------------------------------------------------------


def test_what_is_sent_and_that_every_row_has_a_sample(rule_ranks) -> None:
    answers = rule_ranks(2).run(costs_of_my_share)
    found = {name: cost for costs, _ in answers for name, cost in costs.items()}
    met = set().union(*(rows for _, rows in answers))
    wrong = [
        f"{name}: {cost!r}, declared {COSTS.get(name, free(CASES[name]))!r}"
        for name, cost in found.items()
        if cost != COSTS.get(name, free(CASES[name]))
    ]
    assert not wrong, "\n".join(wrong)
    assert not set(COSTS) - set(CASES), "declared, but there is no such sample"
    assert not set(TABLE) - met, f"no sample meets these rows: {sorted(set(TABLE) - met)}"
    assert not POINTWISE - met, f"no sample meets {sorted(POINTWISE - met)}"
    made = {
        key(n.target)
        for name in CASES
        for n in captured(name).graph.nodes
        if hasattr(n.target, "_schema")
    }
    assert made >= CREATED


def declared(row: Rule, operand: int, dim: int, ndim: int) -> str:
    """A string says all: on both sides free, vanishing one all-reduce, ``whole`` a gather."""
    axis = named_dims(row.operands[operand], ndim)[dim]
    if axis in row.whole:
        return "G"
    return "." if axis in row.result or axis.startswith("...") else "1"


STRINGS = ["linear", "mm", "bmm", "mv", "dot", "cdist", "one_hot", "bucketize.Tensor"]


@pytest.mark.parametrize("name", STRINGS)
def test_strings_mean_what_they_say(name: str) -> None:
    row, case = TABLE[name], CASES[name]
    assert isinstance(row, Rule)
    want = " ".join(
        "".join(declared(row, i, d, len(g.shape)) for d in range(len(g.shape)))
        for i, g in enumerate(case.inputs)
    )
    assert costs(case) == want


def test_no_string_is_left_out() -> None:
    rows = {name for name, row in TABLE.items() if isinstance(row, Rule)}
    assert rows == set(STRINGS)


def test_a_rule_must_be_a_sentence() -> None:
    with pytest.raises(ValueError, match="no '->'"):
        rule("a b, b c")
    with pytest.raises(ValueError, match=r"'d'.* is in no operand"):
        rule("a b, b c -> a d")


def test_leading_dims_are_counted_from_the_right() -> None:
    assert named_dims(("...", "i"), 3) == ["...2", "...1", "i"]
    assert named_dims(("...", "i"), 1) == ["i"]
    assert named_dims(("m", "k"), 2) == ["m", "k"]


def test_ops_of_other_libraries_have_no_row() -> None:
    """A name says nothing about what another library's op does."""
    assert key(torch.ops.aten.mean.dim) == "mean.dim"
    assert key(torch.ops.prims.sum.default) == "prims::sum"


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(len(CHUNKS)), ids=[c[0] for c in CHUNKS])
def test_against_eager(rule_ranks, chunk: int) -> None:
    """Every single cut, in the even layout and the zigzag one by turns."""
    wrong = [line for lines in rule_ranks(2).run(check, CHUNKS[chunk], False) for line in lines]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.full
@pytest.mark.parametrize("chunk", range(len(CHUNKS)), ids=[c[0] for c in CHUNKS])
def test_every_cut_in_both_layouts(rule_ranks, chunk: int) -> None:
    wrong = [line for lines in rule_ranks(3).run(check, CHUNKS[chunk], True) for line in lines]
    assert not wrong, "\n".join(wrong[:20])


RANDOM = [n for n, c in CASES.items() if c.random and "x" not in COSTS.get(n, "")]


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_numbers_for_every_p(rule_ranks, name: str) -> None:
    want = drawn(name, ((0, 0),), 1)
    for p in (2, 3):
        for got in rule_ranks(p).run(drawn, name, ((0, 0),), p):
            for part in want:
                torch.testing.assert_close(got[part], want[part], rtol=1e-12, atol=1e-12)
