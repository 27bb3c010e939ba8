"""ShardedTensor: torch's ops on parts, without a compiler, are those of one process."""

from __future__ import annotations

import pytest
import sharded_jobs as jobs
from compare import assert_close, compare_gradients
from rule_cases import CASES
from sampling import FULL

#: The sample is a program that Dynamo has seen; this one writes into an argument.
NOT_EAGER = {"autograd function"}
REFUSED = {"rrelu eval"}
#: Eager mode draws other numbers.
NAMES = [n for n, case in CASES.items() if not case.random and n not in NOT_EAGER | REFUSED]
CHUNKS = [NAMES[i::24] for i in range(24)]


@pytest.mark.parametrize("chunk", [0, *(FULL(i) for i in range(1, len(CHUNKS)))])
def test_every_op(ranks, chunk: int) -> None:
    """Every sample of the rules, cut in each dim of each input, forward and gradients."""
    for wrong in ranks(2).run(jobs.check, CHUNKS[chunk], 2, timeout=300):
        assert not wrong, "\n".join(wrong[:20])


@pytest.mark.full
@pytest.mark.parametrize("chunk", range(len(CHUNKS)))
def test_every_op_on_three_ranks(ranks, chunk: int) -> None:
    for wrong in ranks(3).run(jobs.check, CHUNKS[chunk], 3, timeout=600):
        assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("p", [FULL(1), 3, FULL(4)])
@pytest.mark.parametrize("name", ["gpt", FULL("llama"), FULL("vit"), FULL("table")])
def test_models_without_a_compiler(ranks, name: str, p: int) -> None:
    want = jobs.model(name, 0)
    for got in ranks(p).run(jobs.model, name, p, timeout=120):
        assert_close("loss", got["loss"], want["loss"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(ranks, name: str) -> None:
    for refused in ranks(2).run(jobs.check, [name], 2):
        assert refused and all("UnsupportedError: aten." in line for line in refused), refused


def test_another_length_on_one_rank(ranks) -> None:
    """A collective would hang, or send what does not belong together."""
    for said in ranks(2).run(jobs.another_length, 2):
        title, *rest = said.splitlines()
        assert title == "the ranks run different ops on tensors that are cut, or with other sizes"
        assert rest[0].startswith("  tests/ranks/sharded_jobs.py:")
        assert rest[2:4] == [
            "  rank 0  aten.cumsum([6, 2] with dim 0 as 6=0:3|3:6)",
            "  rank 1  aten.cumsum([5, 2] with dim 0 as 5=0:3|3:5)",
        ]


@pytest.mark.parametrize("p", [1, FULL(2)])
def test_another_compiler(ranks, p: int) -> None:
    why = "a tensor that is cut was given to torch.compile with another backend than Mosaic's"
    for said in ranks(p).run(jobs.another_compiler, p):
        assert said == [why] * len(jobs.PROGRAMS)


@pytest.mark.parametrize("p", [1, FULL(2)])
def test_writes_by_an_index_that_no_rank_has(ranks, p: int) -> None:
    """Not into the spare row behind a rank's rows."""
    assert ranks(p).run(jobs.outside, p) == [[]] * p


@pytest.mark.parametrize("rows", [4, FULL(0), FULL(2)])
def test_other_rows_than_the_mask_is_true(ranks, rows: int) -> None:
    for without, compiled in ranks(2).run(jobs.miscounted, 2, rows):
        title, *rest = without.splitlines()
        assert title == f"a write by a mask has {rows} rows for 3 elements that are true"
        assert len(rest) == 1 and rest[0].startswith("  fix  give one row for each")
        assert compiled.startswith(f"{title}\n  tests/ranks/sharded_jobs.py:")


def test_writes_to_masks_that_wait(ranks) -> None:
    """A view that was taken before would not see it."""
    for seen, said in ranks(2).run(jobs.written_patterns, 2):
        assert seen == [True, False]
        assert len(said) == 6 and all("shares memory in a way that is not" in x for x in said)


def test_in_and_out(ranks) -> None:
    """Cut twice, made of parts, read, written to, refused."""
    for got in ranks(4).run(jobs.in_and_out):
        assert got == {
            "cut": [2, 4, 3, 8],
            "whole again": True,
            "gradient": True,
            "of parts": True,
            "written": True,
            "number": True,
            "repr": "ShardedTensor(shape=[2, 7, 5, 8], dim 1 over 'r' as 7=0:4|4:7; "
            "dim 2 over 'c' as 5=0:3|3:5",
            "again": "the tensor is cut there, or over that mesh axis, already",
            "no dim": "there is no dim 7 in the tensor",
            "no part": "the part is not what the layout says of dim 0",
        } | ({"cut": [2, *got["cut"][1:3], 8]})


@pytest.mark.parametrize("read", ["mean", FULL("item"), "full", "text"])
def test_read_on_one_rank(ranks, read: str) -> None:
    """It would wait for ever."""
    said = ranks(2).run(jobs.on_one_rank, 2, read)[0]
    if read == "text":  # shows this rank's part
        assert said == ""
        return
    first, *rest = said.splitlines()
    assert first == "ranks [1] did not read what is cut within 2 s, as rank 0 did"
    assert rest[0].startswith("  tests/ranks/sharded_jobs.py:") and rest[1] == f"    {LINES[read]}"


LINES = {
    "mean": '"mean": lambda x: x.mean(),',
    "item": '"item": lambda x: x[1].item(),',
    "full": '"full": lambda x: x.full_tensor(),',
}
