"""The table models that people use, with random weights: rows stay cut, and all is exact."""

from __future__ import annotations

import pytest
import table_jobs as jobs
import torch
from compare import assert_close, compare_gradients
from sampling import FULL
from torch import Tensor

NAMES = ("tabpfn_v2", "tabpfn_v2_5", "tabpfn_v2_6", "tabpfn_v3", "tabpfn_v3_5", "tabicl")
VARIANTS = (
    *(f"{name}_nan" for name in NAMES[:5]),
    *(f"{name}_regression" for name in NAMES),
    "tabpfn_v2_5_constant", "tabpfn_v3_chunked", "tabpfn_v3_5_chunked", "tabicl_v1",
)  # fmt: skip
#: A value's rank among all rows, which v3.5 takes, and what its chunks of rows are joined to.
SORTS = {"aten.sort works along the axis"}
GATHERED = {
    "tabpfn_v3_5": SORTS,
    "tabpfn_v3_5_nan": SORTS,
    "tabpfn_v3_5_regression": SORTS,
    "tabpfn_v3_5_chunked": SORTS
    | {
        "aten.cat has an operand that is joined along another dim",
        "aten.cat has an operand that is needed cut in another dim",
    },
    "tabpfn_v3_chunked": {"aten.cat has an operand that is joined along another dim"},
}

#: Classes that there are: numbers of y, not of cells.
OF_Y = {"aten._unique2 gives as many elements as its values say"}

#: TabICL's encoders of y are float32 (table_models says why): sums of another order round there.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("p", [2, FULL(3), FULL(4)])
@pytest.mark.parametrize(
    "name, mode",
    [
        ("tabpfn_v2_shallow", "train"),
        ("tabicl", "no_grad"),
        *(FULL(name, "train") for name in (*NAMES, *VARIANTS)),
        *(FULL(name, "no_grad") for name in (*NAMES, *VARIANTS) if name != "tabicl"),
        *(FULL(name, "inference") for name in (*NAMES, *VARIANTS)),
    ],
)
def test_op_by_op(ranks, name: str, mode: str, p: int) -> None:
    check(ranks, p, name, "eager", mode)


@pytest.mark.parametrize("p", [2, FULL(3), FULL(4)])
@pytest.mark.parametrize("name", ["tabpfn_v2", *map(FULL, (*NAMES[1:], *VARIANTS))])
@pytest.mark.parametrize("mode", [FULL("no_grad"), FULL("inference"), "train"])
def test_compiled(ranks, name: str, mode: str, p: int) -> None:
    for got in check(ranks, p, name, "compiled", mode):
        assert got["graphs"]
        assert name in GATHERED or got["whole"] == []  # nor is anything long in another graph


@pytest.mark.full
def test_more_ranks_than_training_rows(ranks) -> None:
    check(ranks, 4, "tabpfn_v2", "eager", "train", 5)


def check(ranks, p: int, name: str, how: str, mode: str, rows: int = 13) -> list[dict]:
    want = jobs.run(0, name, how, mode, rows)
    found = ranks(p).run(jobs.run, p, name, how, mode, rows, timeout=300)
    for got in found:
        assert_close("output", got["out"], want["out"], 1e-12)
        assert got["rows are cut"]
        assert set(got["gathered"]) <= GATHERED.get(name, set()) | OF_Y
        if mode == "train":
            for dtype, tol in TOLERANCES.items():
                pair = [of_dtype(side["gradients"], dtype) for side in (want, got)]
                compare_gradients(*pair, tol)
    return found


def of_dtype(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x for name, x in found.items() if x.dtype == dtype}
