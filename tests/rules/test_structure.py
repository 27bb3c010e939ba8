"""Masks as structure: in torch's flex kernels (on a CPU their plain math), and the blocks they see.

Each program of ``test_masks.py`` is read, and attended under by two simulated ranks in zigzag:
visits of keys, merges, and a backward with the global output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu.check_masks import by_ranks
from hypothesis import HealthCheck, given, settings
from mask_programs import attended, attention_of, read
from rules.test_masks import BOOLEAN, IDS, MASKS, REAL, TABLE, WRAPPING
from torch import Tensor, arange, fx, nn

import mosaic
from mosaic.attention import dense, kernels
from mosaic.attention.blocks import FULL, Band, Piece
from mosaic.attention.dense import is_more, why_dense
from mosaic.attention.kernels import flex as flex_module
from mosaic.attention.kernels import tiled
from mosaic.attention.kernels.flex import FLEX, lists_of
from mosaic.attention.kernels.kernel import CHANGED, STRUCTURE, TABLES, Case, Kernel
from mosaic.attention.kernels.math import MATH
from mosaic.attention.kernels.seen_blocks import Blocks, blocks_of
from mosaic.attention.kernels.tiled import TILES
from mosaic.attention.structure import Structure, of_band, of_documents, positions, together
from mosaic.attention.visit import Inputs
from mosaic.layout import Layout
from mosaic.masks.words import band_of, scores_of, tile_of
from mosaic.partition.values import Call
from mosaic.torch_private import flex_blocks


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> list[Structure]:
    """As if flex did all structures but tables, which go in tiles of a few rows; the masks that
    they were given."""
    given: list[Structure] = []

    def able(kernel: Kernel, fits: Callable[[Case], bool]) -> Kernel:
        def forward(*tensors: Tensor, mask: Structure, **options: Any) -> Any:
            given.append(mask)
            return kernel.forward(*tensors, mask=mask, **options)

        return kernel._replace(fits=fits, forward=forward, most_batches=1)

    pairs = able(FLEX, lambda case: case.is_structured and case.scores != TABLES)
    tables = able(TILES, lambda case: case.is_structured and case.scores == TABLES)
    monkeypatch.setattr(kernels, "KERNELS", (pairs, tables, MATH))
    monkeypatch.setattr(tiled, "MOST", 64)
    return given


class Until(fx.Interpreter):
    """Keeps what an attention is called with."""

    def run_node(self, n: fx.Node) -> Any:
        if n is attention_of(self.module):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.call = Call(n.target, args, kwargs, n.meta["val"], n)
        return super().run_node(n)


def four_dims(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))


def by_call(call: Call, dout: Tensor) -> list[Tensor]:
    """out, dq, dk, dv of what simulated ranks do for a call of sdpa."""
    tensors = [call[name].detach() for name in ("query", "key", "value")]
    ids = [call.bound.get(name) for name in ("query_documents", "key_documents")]
    leaves = call.bound.get("leaves") or ()
    inputs = Inputs(four_dims(call["attn_mask"]), *ids, None, leaves)
    programs = tile_of(call.bound), scores_of(call.bound)
    return by_ranks([*tensors, dout], inputs, band_of(call.bound), 0.5, *programs, ranks=2)[:4]


def check(make: Callable[..., Tensor], *inputs: Tensor) -> None:
    """What ranks do under a mask is what one process does."""
    program, tensors = attended(make)
    reader = Until(read(program, *tensors, *inputs))
    (want,) = reader.run(*tensors, *inputs)
    dout = torch.randn_like(want).masked_fill(want.isnan(), 0)
    grads = torch.autograd.grad(want, tensors, dout)
    found = by_call(reader.call, dout)
    for x, y in zip(found, (want, *grads), strict=True):
        torch.testing.assert_close(x, y.detach().nan_to_num(0))


BOOLEAN_MASKS = {
    name: case
    for name, case in {**MASKS, **WRAPPING}.items()
    if "float" not in case[2] and "bias" not in case[2]
}


#: But for one of nan; and of a row of nothing but finfo.min ATen's gradients are wrong.
FLOAT_MASKS = {
    name: case
    for name, case in MASKS.items()
    if "float by tiles" in case[2] and name not in ("nan", "padding of lowest, causal")
}


@pytest.mark.parametrize("name", FLOAT_MASKS)
def test_programs_that_are_added(flex: list[Structure], name: str) -> None:
    """Whether mild or not: no tile is made."""
    make, inputs, _ = FLOAT_MASKS[name]
    check(make, *inputs)
    assert flex


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BOOLEAN)
def test_any_boolean_mask(flex: list[Structure], make: Callable) -> None:
    check(make, IDS, REAL, TABLE)


# --- which blocks are seen ----------------------------------------------------------------------


def pairs(mask: Structure, rows: int, keys: int) -> Tensor:
    """(batch, heads, rows, keys) of a structure, boolean."""
    tile = mask.tile(Piece(0, rows, 0, keys))
    return tile.expand(*tile.shape[:2], rows, keys)


def true_blocks(seen: Tensor, size: int) -> Blocks:
    rows, keys = seen.shape[2:]
    missing = [0, -keys % size, 0, -rows % size]
    cut = F.pad(seen, missing).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return Blocks(cut.any(5).any(3), cut.all(5).all(3))


@pytest.mark.parametrize("name", BOOLEAN_MASKS)
def test_programs(flex: list[Structure], name: str) -> None:
    """Of blocks nothing that is seen is left out, nothing that is hidden is in a full one."""
    make, inputs, words = BOOLEAN_MASKS[name]
    check(make, *inputs)
    structures = ("documents", "padding", "boolean by tiles")
    assert bool(flex) == ("dense" not in words and any(word in words for word in structures))
    for mask in flex:
        rows, keys = (max([1, *(x.shape[d] for x in mask.leaves if x.ndim)]) for d in (2, 3))
        found, want = blocks_of(mask, rows, keys, 2), true_blocks(pairs(mask, rows, keys), 2)
        assert (found.some | ~want.some).all() and (want.full | ~found.full).all()


IN_ORDER = torch.tensor([[0] * 5 + [1] * 4 + [2] * 11, [3] * 20])
BANDS = (Band(None, 0), Band(6, 0), Band(3, 2), Band(None, -1), Band(2, None), Band(-2, 4))


@pytest.mark.parametrize("band", [FULL, *BANDS], ids=str)
@pytest.mark.parametrize("ids", [None, IN_ORDER], ids=["", "documents"])
@pytest.mark.parametrize("rows", [((0, 20),), ((0, 5), (15, 20)), ((3, 10),)], ids=str)
def test_blocks_are_exact_of_a_band_or_documents_in_order(
    band: Band, ids: Tensor | None, rows: Any
) -> None:
    at = [positions(x, torch.device("cpu")) for x in (rows, ((0, 20),))]
    parts = [] if band == FULL else [of_band(band, *at)]
    parts += [] if ids is None else [of_documents(ids[:, at[0]], ids)]
    for part in parts:
        found = blocks_of(part, len(at[0]), 20, 4)
        want = true_blocks(pairs(part, len(at[0]), 20), 4)
        assert torch.equal(found.full, want.full)
        if len(rows) == 1:  # a block with a gap in it lies between far ends
            assert torch.equal(found.some, want.some)


def test_a_block_mask_is_torchs() -> None:
    """The lists that kernels get, of 128 x 128 blocks, against ``create_block_mask``."""
    from torch.nn.attention.flex_attention import create_block_mask

    ids = torch.arange(700)[None] // 150
    at = positions(((0, 700),), torch.device("cpu"))
    mask = together([of_documents(ids, ids), of_band(Band(None, 0), at, at)])
    want = create_block_mask(
        lambda b, h, i, j: (ids[0, i] == ids[0, j]) & (j <= i), None, None, 700, 700, device="cpu"
    )
    lists = lists_of(mask.program, 700, 700)(*mask.leaves)
    blocks = flex_blocks((700, 700), lists, 128, lambda *_: None)
    for got, known in zip(blocks[2:10], want.as_tuple()[2:10], strict=True):
        if got.ndim == 3:
            counts = known
            assert torch.equal(got, known)
            continue
        listed = torch.arange(got.shape[3]) < counts[..., None]
        assert torch.equal(got.masked_fill(~listed, 0), known.masked_fill(~listed, 0))


# --- the choice, and what plans say of it ---------------------------------------------------------


SOFTCAP = "float32: tanh(%0); mul.Tensor(%1, 50.0)"
TABLE_BIAS = "float32 d%2 mild: sub.Tensor(%1, %0); abs(%3); index(%2, %4)"


@pytest.mark.parametrize(
    ("mask", "changed", "why"),
    [
        ("causal, documents", {}, ""),
        ("documents, padding", {"dtype": torch.float32}, ""),
        ("boolean by tiles", {"dtype": torch.float16}, ""),
        ("causal, documents", {"head_dim": 8}, "head dims 8 and 64"),
        ("causal, documents", {"v_dim": 257}, "head dims 64 and 257"),
        ("causal, documents", {"dropout": True}, "dropout"),
        ("causal, documents", {"dtype": torch.float64}, "float64"),
        ("causal, documents", {"device": "cpu"}, "no GPU"),
        ("causal, dense boolean", {}, "an input"),
        ("softcap 50, dense float", {}, "added to the scores"),
        ("softcap 50", {"dtype": torch.float64}, "float64"),
        ("softcap 50", {"scores": CHANGED}, ""),
        ("bias by tiles", {"scores": TABLES}, ""),
        ("bias by tiles", {"scores": TABLES, "dropout": True}, "dropout"),
        ("causal, bias of keys", {}, "added to the scores"),
    ],
)
def test_why_a_mask_is_dense(
    monkeypatch: pytest.MonkeyPatch, mask: str, changed: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(flex_module, "find_spec", lambda name: name)
    case = Case("cuda", 9, torch.bfloat16, 64, 64, None, False, False)._replace(**changed)
    reason = why_dense(mask, case)
    assert (why in reason) if why else reason == ""


@pytest.mark.parametrize(
    ("mask", "band", "more"),
    [
        ("", FULL, False),
        ("causal", Band(None, 0), False),
        ("sinks, causal, window 6", Band(5, 0), False),
        ("sinks", FULL, False),
        ("causal, documents", Band(None, 0), True),
        ("sinks, padding", FULL, True),
        ("softcap 50, causal", Band(None, 0), True),
    ],
)
def test_whether_a_mask_says_more_than_a_band(mask: str, band: Band, more: bool) -> None:
    assert is_more(mask, band) is more


def test_only_flex_does_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_module, "find_spec", lambda name: name)
    case = Case("cuda", 9, torch.bfloat16, 64, 64, STRUCTURE, False, False)
    assert [x.name for x in kernels.KERNELS if x.fits(case)] == ["flex"]
    assert not any(x.fits(case._replace(device="cpu")) for x in kernels.KERNELS)


def test_a_score_s_gradient_is_traced_in_the_thread_that_asks() -> None:
    """Autograd's own thread of a GPU may be the one that waits for it, in a backward: for ever."""
    assert torch.autograd.is_multithreading_enabled()
    assert not flex_module.afresh(torch.device("cpu"), torch.autograd.is_multithreading_enabled)


class Masked(nn.Module):
    """Attention under one of these, in the way of a model."""

    def __init__(self, mask: str):
        super().__init__()
        self.mask = mask
        self.table = nn.Embedding(17, 4)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, 5))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        at = arange(x.shape[2])
        seen, ahead = at <= at[:, None], at - at[:, None]
        if self.mask == "documents":
            return F.scaled_dot_product_attention(x, x, x, seen & (ids == ids[:, None]))
        if self.mask == "padding":
            return F.scaled_dot_product_attention(x, x, x, seen & (ids > 1))
        if self.mask == "softcap":
            scores = (x @ x.mT / 3).tanh() * 3
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ x
        if self.mask == "ALiBi":
            bias = -self.slopes[:, None, None] * ahead.abs()
        else:
            bias = self.table(ahead.clamp(-8, 8) + 8).movedim(2, 0)
        if self.mask == "table and padding":
            bias = bias + (1.0 - (ids > 1).float()) * torch.finfo(torch.float32).min
        else:
            bias = bias.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(x, x, x, bias[None])


@pytest.mark.parametrize(
    ("mask", "method"),
    [
        *(("documents", method) for method in ("ring", "all_gather", "ulysses")),
        *((mask, "ring") for mask in ("padding", "softcap", "ALiBi", "table", "table and padding")),
        ("table and padding", "ulysses"),
    ],
)
def test_no_rank_has_a_tensor_of_rows_x_keys(flex: list[Structure], mask: str, method: str) -> None:
    """Neither of its rows and all keys, nor of those of one visit, forward or backward."""
    n = 384
    x = torch.randn(1, 4, n, 1, requires_grad=True)
    spec = mosaic.ShardingSpec(inputs={"x": "batch heads rows dim"}, axes={"rows": method})
    found = mosaic.explain(Masked(mask), x, arange(n) // 80, spec=spec, sp_size=4)
    for graph in (found.graphs["forward"], found.graphs["backward"]):
        vals = [
            node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)
        ]
        assert max(val.numel() for val in vals) < 96 * 96 * 4
        ran = "tiles" if mask.startswith("table") else "flex"
        assert any(f"mosaic.{ran}" in str(node.target) for node in graph.nodes)


def program_of_documents(x: Tensor, ids: Tensor) -> Tensor:
    at = arange(len(ids))
    seen = (at <= at[:, None]) & (ids == ids[:, None])
    return F.scaled_dot_product_attention(x, x, x, seen)


@pytest.mark.parametrize("why", ["", "no kernel"])
def test_documents_are_cut_into_many_zigzags(
    monkeypatch: pytest.MonkeyPatch, flex: list[Structure], why: str
) -> None:
    """Where a kernel computes the mask pair by pair; else a causal zigzag has few pieces."""
    monkeypatch.setattr(dense, "refused", lambda case: why)
    n, p = 4096, 2
    x = torch.randn(1, 1, n, 1, requires_grad=True)
    spec = mosaic.ShardingSpec(inputs={"x": "batch heads rows dim"}, axes={"rows": "ring"})
    found = mosaic.explain(program_of_documents, x, arange(n) // 100, spec=spec, sp_size=p)
    wanted = Layout.zigzag if why else Layout.zigzags
    assert found.layout == str(wanted(n, p))
    ran = {str(node.target) for node in found.graphs["forward"].nodes}
    assert "mosaic.flex.default" in ran
    assert found.gathered == []


@pytest.mark.parametrize(("p", "most"), [(4, 1.06), (8, 1.12)])
def test_documents_are_balanced(p: int, most: float) -> None:
    """The blocks that ranks see, of eight documents of any lengths; one zigzag leaves some rank up
    to 1.85 times the mean. Of equal ones all see as many."""
    n, worst = 32_768, {}
    assert len({*seen_by_ranks(Layout.zigzags(n, p), arange(n) // (n // 8))}) == 1
    for seed in range(5):
        torch.manual_seed(seed)
        ids = (arange(n)[:, None] >= torch.randint(n, (7,))).sum(1)
        for cut in (Layout.zigzag, Layout.zigzags):
            counts = seen_by_ranks(cut(n, p), ids)
            uneven = max(counts) / (sum(counts) / p)
            worst[cut] = max(worst.get(cut, 1.0), uneven)
    assert worst[Layout.zigzags] < most < 1.5 < worst[Layout.zigzag]


def seen_by_ranks(layout: Layout, ids: Tensor) -> list[int]:
    """How many blocks of its queries and anybody's keys each rank sees, causally."""
    at = [positions(intervals, torch.device("cpu")) for intervals in layout.ranks]

    def seen(q: Tensor, k: Tensor) -> int:
        band = of_band(Band(None, 0), q, k)
        mask = together([of_documents(ids[None, q], ids[None, k]), band])
        return int(blocks_of(mask, len(q), len(k)).some.sum())

    return [sum(seen(q, k) for k in at) for q in at]
