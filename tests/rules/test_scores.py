"""Score programs and biases: by plain math, in torch's flex kernels (on a CPU their plain math) and
tile by tile, the output and every gradient, also of what is learned.

Two simulated ranks in zigzag, as in ``test_structure.py``, against attention written out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.check_masks import by_ranks
from torch import Tensor, arange

from mosaic.attention import kernels
from mosaic.attention.blocks import FULL, Band, Piece
from mosaic.attention.kernels import seen_blocks, tiled
from mosaic.attention.kernels.flex import FLEX
from mosaic.attention.kernels.kernel import CHANGED, SOFTCAP, TABLES, Case, change_of
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.tiled import TILES
from mosaic.attention.scores import bias_of, then, with_bias
from mosaic.attention.structure import Structure
from mosaic.attention.tiles import TileProgram
from mosaic.attention.visit import Inputs

N = 30
DOUBLE = torch.float64
ROWS, COLUMNS = arange(N).view(1, 1, N, 1), arange(N).view(1, 1, 1, N)
IDS = torch.stack([arange(N) // 7, arange(N) // 11])
CAUSAL = Band(None, 0)
CAP = "float64: tanh(%{0}); mul.Tensor(%{1}, 5.0)"
DISTANCE = "sub.Tensor(%1, %0); clamp(%{0}, -8, 8); add.Tensor(%{1}, 8); "
TABLE = "float64 d%2 mild: " + DISTANCE.format(3, 4) + "embedding(%2, %5)"
TWICE = (
    "float64 d%2 mild: sub.Tensor(%1, %0); abs(%3); index(%2, %4); "
    "remainder.Scalar(%4, 3); index(%2, %6); mul.Tensor(%5, %7)"
)
LOWEST = torch.finfo(DOUBLE).min
LOW = (
    f"float64 d%2: {DISTANCE.format(4, 5)}embedding(%2, %6); le.Tensor(%1, %0); "
    f"logical_and(%8, %3); filled(0.0, torch.float64); filled({LOWEST}, torch.float64); "
    "where.self(%9, %10, %11); add.Tensor(%7, %12)"
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(len(shape)))


#: The second batch sees none of these keys.
PADDING = ((arange(N) < 20) & torch.tensor([[True], [False]])).view(2, 1, 1, N)
#: (program of the mask, program of the scores, leaves, band, documents)
CASES: dict[str, tuple[str, str, tuple[Tensor, ...], Band, Tensor | None]] = {
    "softcap": ("", CAP.format(0, 1), (), FULL, None),
    "softcap, documents": ("", CAP.format(0, 1), (), CAUSAL, IDS),
    "table": (TABLE, "", (ROWS, COLUMNS, randn(17, 4)), CAUSAL, IDS),
    "table of all heads": (TABLE, CAP.format(3, 4), (ROWS, COLUMNS, randn(17, 1)), Band(9, 0), IDS),
    "padding of a table": (
        TABLE.replace("(%2, %5)", "(%2, %5, 8)"),
        "",
        (ROWS, COLUMNS, randn(17, 4)),
        CAUSAL,
        None,
    ),
    "a table looked up twice": (TWICE, "", (ROWS, COLUMNS, randn(N, 4)), FULL, IDS),
    "slopes": (
        "float64 d%2 mild: sub.Tensor(%1, %0); mul.Tensor(%2, %3)",
        "",
        (ROWS, COLUMNS, randn(1, 4, 1, 1)),
        CAUSAL,
        IDS,
    ),
    "a learned number and keys": (
        "",
        "float64 d%0 d%1: mul.Tensor(%2, %0); add.Tensor(%3, %1)",
        (torch.tensor(1.5, dtype=DOUBLE), randn(2, 4, 1, N)),
        CAUSAL,
        None,
    ),
    "learned by both": (
        TABLE,
        "float64 d%2: sub.Tensor(%1, %0); abs(%4); index(%2, %5); mul.Tensor(%6, %3)",
        (ROWS, COLUMNS, randn(N + 17, 4)),
        CAUSAL,
        None,
    ),
    "low numbers": (LOW, "", (ROWS, COLUMNS, randn(17, 4), PADDING), FULL, None),
    "low numbers, softcap": (
        LOW,
        CAP.format(4, 5),
        (ROWS, COLUMNS, randn(17, 4), PADDING),
        Band(12, 0),
        IDS,
    ),
}


def seen_by(band: Band, ids: Tensor | None) -> Tensor:
    ahead = arange(N) - arange(N)[:, None]
    left, right = (N if x is None else x for x in band)
    seen = ((ahead >= -left) & (ahead <= right))[None, None]
    return seen if ids is None else seen & (ids[:, None, :, None] == ids[:, None, None])


def written_out(tensors: list[Tensor], name: str) -> list[Tensor]:
    tile, scores, leaves, band, ids = CASES[name]
    programs = [TileProgram.parse(x) for x in (tile, scores) if x]
    learned = sorted({i for program in programs for i in program.learned})
    given = [x.clone().requires_grad_() if i in learned else x for i, x in enumerate(leaves)]
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    score = q @ k.repeat_interleave(2, 1).mT * 0.7
    score = TileProgram.parse(scores)(*given, score) if scores else score
    score = score + TileProgram.parse(tile)(*given) if tile else score
    weights = score.masked_fill(~seen_by(band, ids), -torch.inf).softmax(-1)
    out = weights @ v.repeat_interleave(2, 1)
    wanted = [q, k, v, *(given[i] for i in learned)]
    return [out.detach(), *torch.autograd.grad(out, wanted, tensors[3])]


#: What is tried of each beside plain math; tables are not for flex.
ABLE = {
    "math": (),
    "flex": (FLEX._replace(fits=lambda x: x.is_structured and x.scores != TABLES, most_batches=1),),
    "tiles": (TILES._replace(fits=lambda x: x.is_structured and x.scores != "", most_batches=1),),
}


@pytest.mark.parametrize("kernel", ABLE)
@pytest.mark.parametrize("name", CASES)
def test_equals_what_is_written_out(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: str
) -> None:
    monkeypatch.setattr(kernels, "KERNELS", (*ABLE[kernel], MATH))
    monkeypatch.setattr(seen_blocks, "BLOCK", 4)
    monkeypatch.setattr(tiled, "MOST", 7 * 4 * N)
    tile, scores, leaves, band, ids = CASES[name]
    tensors = [torch.randn(2, heads, N, 8, dtype=DOUBLE) for heads in (4, 2, 2, 4)]
    inputs = Inputs(None, ids, ids, None, leaves)
    found = by_ranks(tensors, inputs, band, 0.7, tile, scores, ranks=2)
    for x, y in zip(found, written_out(tensors, name), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_low_numbers_weighs_them_alike(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Its log-sum-exp would round their number away: blocks of other lengths then count as one."""
    able = FLEX._replace(fits=lambda case: case.is_structured)
    monkeypatch.setattr(kernels, "KERNELS", (able, MATH))
    q, k, v, dout = (torch.randn(1, 2, N, 8, dtype=dtype) for _ in range(4))
    low = torch.full([1, 1, 1, N], torch.finfo(dtype).min, dtype=dtype)
    words = str(dtype).removeprefix("torch.")
    tile = f"{words}: sub.Tensor(%1, %0); mul.Scalar(%3, 0); add.Tensor(%4, %2)"
    inputs = Inputs(None, None, None, None, (ROWS, COLUMNS, low))
    out = by_ranks([q, k, v, dout], inputs, FULL, 0.5, tile)[0]
    torch.testing.assert_close(out, v.double().mean(2, True).expand(out.shape), atol=1e-2, rtol=0)


def test_only_math_changes_scores_in_any_way() -> None:
    for device, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float32), ("cpu", DOUBLE)):
        for mask in (None, torch.bool, dtype):
            case = Case(device, 9, dtype, 64, 64, mask, False, False, scores=CHANGED)
            assert [x.name for x in kernels.KERNELS if x.fits(case)] == ["math"]


def test_programs_are_put_together() -> None:
    leaves: Any = (torch.tensor(2.0), torch.ones(1, 1, 1, 3))
    scores = Structure("float32: mul.Tensor(%2, %0)", leaves)
    bias = Structure("float32 d%1: neg(%1); add.Tensor(%2, %0)", leaves)
    score, less = torch.full([1, 1, 3, 3], 10.0), torch.full([1, 1, 3, 1], 4.0)
    both = then(with_bias(scores, bias), "sub.Tensor", less)
    assert both.parsed.learned == (1,)
    found = both.parsed(*both.of_piece(Piece(0, 2, 1, 3)).leaves, score[:, :, :2, 1:])
    assert torch.equal(found, torch.full([1, 1, 2, 2], 10.0 * 2 - 1 + 2 - 4))
    assert bias_of(both) is None


def test_what_is_added_is_told_from_a_change() -> None:
    """And the shift that is taken off behind it."""
    leaves: Any = (torch.tensor(2.0), torch.arange(3.0).view(1, 1, 1, 3))
    bias = Structure("float32 d%1: neg(%1); add.Tensor(%2, %0)", leaves)
    shift, whole = torch.full([1, 1, 3, 1], 4.0), Piece(0, 3, 0, 3)
    for changes, less in (
        (with_bias(None, bias), None),
        (then(with_bias(None, bias), "sub.Tensor", shift), shift),
    ):
        added, taken_off = bias_of(changes) or pytest.fail("is added")
        assert added.parsed.learned == (1,) and taken_off is less
        assert torch.equal(added.tile(whole), bias.tile(whole))
    assert bias_of(Structure("float32: mul.Tensor(%2, %0); add.Tensor(%2, %3)", leaves)) is None
    assert bias_of(Structure(CAP.format(2, 3), leaves)) is None


def test_the_kind_of_a_change() -> None:
    assert change_of(CAP.format(0, 1), "") == SOFTCAP
    assert change_of(CAP.format(3, 4), TABLE) == TABLES
    assert change_of("", "float64 mild: sub.Tensor(%1, %0); abs(%2)") == CHANGED
    assert change_of("", "") == ""
