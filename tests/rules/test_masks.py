"""What is read of a mask is exact: the same output and gradients, and the structure it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_programs import words
from torch import Tensor, arange

import mosaic.masks.op  # noqa: F401
from mosaic.attention.blocks import Band
from mosaic.masks.read import band_of
from mosaic.torch_private import FakeTensorMode

INF = float("inf")
LOW = torch.finfo(torch.float64).min
DOUBLE = {"dtype": torch.float64}
N = 7

IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 3]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
NOTHING_REAL = torch.tensor([[0] * 7, [1] * 7])
TABLE = torch.tensor([[1, 0, 1, 1, 0, 1, 1]] * 7) + torch.eye(7, dtype=torch.long) > 0


def bias(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), **DOUBLE).view(shape).requires_grad_()


def causal() -> Tensor:
    return arange(N)[None] <= arange(N)[:, None]


def same(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


def packed(positions: Tensor) -> Tensor:
    """As transformers: texts are runs of consecutive positions; a window of 3."""
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    ids = (steps != 1).cumsum(-1)
    b, q, k = arange(2)[:, None, None, None], arange(N)[:, None], arange(N)[None]
    before = positions[b, k] <= positions[b, q]
    return (ids[b, q] == ids[b, k]) & before & (positions[b, k] > positions[b, q] - 3)


def blocks() -> Tensor:
    return (arange(N) // 3)[:, None] == (arange(N) // 3)[None]


def distance() -> Tensor:
    return arange(N) - arange(N)[:, None] + N - 1


def zeros() -> Tensor:
    return torch.zeros(N, N, **DOUBLE)


#: mask, its inputs, what is read of it
MASKS: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "positions": (causal, [], "causal"),
    "tril": (lambda: torch.tril(torch.ones(N, N)).bool(), [], "causal"),
    "not triu": (lambda: ~torch.triu(torch.ones(N, N, dtype=torch.bool), 1), [], "causal"),
    "tril is 0": (lambda: zeros().masked_fill(torch.ones(N, N).tril() == 0, -INF), [], "causal"),
    "triu of -inf": (lambda: torch.triu(torch.full((N, N), -INF, **DOUBLE), 1), [], "causal"),
    "triu times -inf": (lambda: torch.triu(torch.ones(N, N, **DOUBLE) * -INF, 1), [], "causal"),
    "log of tril": (lambda: torch.ones(N, N, **DOUBLE).tril().log(), [], "causal"),
    "subsequent": (
        lambda: torch.nn.Transformer.generate_square_subsequent_mask(N, **DOUBLE),
        [],
        "causal",
    ),
    "a table": (
        lambda: torch.tensor([[q >= k for k in range(N)] for q in range(N)]),
        [],
        "causal",
    ),
    "lowest": (lambda: torch.where(causal(), 0.0, torch.tensor(LOW, **DOUBLE)), [], "causal"),
    "lowest of bfloat16": (
        lambda ids: torch.where(causal() & same(ids), zeros(), torch.finfo(torch.bfloat16).min),
        [IDS],
        "causal, documents",
    ),
    "window": (lambda: causal() & (arange(N)[:, None] - arange(N) < 3), [], "causal, window 3"),
    "both sides": (lambda: (arange(N)[:, None] - arange(N)).abs() <= 2, [], "window -2 to +2"),
    "everything": (lambda: torch.ones(N, N).bool(), [], ""),
    "nothing": (lambda: torch.zeros(N, N).bool(), [], "dense boolean"),
    "blocks": (blocks, [], "documents"),
    "blocks before": (lambda: blocks() & causal(), [], "causal, documents"),
    "documents": (same, [IDS], "documents"),
    "documents of all": (lambda ids: ids[:, None] == ids[None], [IDS[0].int()], "documents"),
    "documents in another order": (
        lambda ids: (ids[:, :, None] == ids[:, None, :]).transpose(1, 2)[:, None] & causal(),
        [IDS],
        "causal, documents",
    ),
    "packed": (
        packed,
        [torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 7, 8, 1, 2]])],
        "causal, window 3, documents",
    ),
    "packed once": (lambda: packed(arange(N).expand(2, -1)), [], "causal, window 3"),
    "order of data": (
        lambda x: x[:, None, :, None] >= x[:, None, None, :],
        [IDS],
        "boolean by tiles",
    ),
    "padding": (lambda x: x[:, None, None].expand(-1, 1, N, -1).bool(), [REAL], "padding"),
    "padding, causal": (lambda x: x[:, None, None].bool() & causal(), [REAL], "causal, padding"),
    "padding of -inf": (
        lambda x: zeros().masked_fill(x[:, None, None] == 0, -INF),
        [NOTHING_REAL],
        "padding",
    ),
    "nan": (
        lambda: zeros().masked_fill(~causal(), float("nan")),
        [],
        "float by tiles",
    ),
    "half": (
        lambda: zeros().float().masked_fill(~causal(), -3.4028234663852886e38).bfloat16().double(),
        [],
        "causal",
    ),
    "padding of lowest": (
        lambda x: zeros().masked_fill(x[:, None, None] == 0, LOW),
        [NOTHING_REAL],
        "bias of keys",
    ),
    "padding of lowest, causal": (
        lambda x: zeros().masked_fill(~(x[:, None, None].bool() & causal()), LOW),
        [NOTHING_REAL],
        "float by tiles",
    ),
    "data": (lambda x: x, [TABLE], "dense boolean"),
    "data, causal": (lambda x: x & causal(), [TABLE], "causal, dense boolean"),
    "bias": (lambda x: x, [bias(1, 3, N, N)], "dense float"),
    "bias, causal": (
        lambda x: x.masked_fill(~causal(), -INF),
        [bias(1, 3, N, N)],
        "causal, dense float",
    ),
    "bias without gradient, causal": (
        lambda x: torch.where(causal(), x.detach(), -INF),
        [bias(1, 3, N, N)],
        "causal, dense float",
    ),
    "bias and triu": (
        lambda x: x + torch.triu(torch.full((N, N), -INF, **DOUBLE), 1),
        [bias(3, N, N)],
        "causal, dense float",
    ),
    "alibi": (
        lambda slopes: (slopes[:, None, None] * arange(N)).masked_fill(~causal(), -INF),
        [bias(3)],
        "causal, bias of keys",
    ),
    "table": (lambda t: t[distance()].movedim(2, 0), [bias(13, 3)], "float by tiles"),
    "table of heads": (lambda t: t[:, distance()], [bias(3, 13)], "float by tiles"),
    "one table, causal": (
        lambda t: t[distance()].masked_fill(~causal(), -INF),
        [bias(13)],
        "causal, float by tiles",
    ),
    "embedding, padding": (
        lambda t, x: (
            F.embedding(distance().clamp(3, 9) - 3, t).permute(2, 0, 1)
            + torch.where(x[:, None, None].bool(), torch.zeros((), **DOUBLE), LOW)
        ),
        [bias(7, 3), NOTHING_REAL],
        "float by tiles",
    ),
    "slopes": (
        lambda s, t: s[:, None, None] * -distance().sqrt() + t.detach() * s.detach()[:, None, None],
        [bias(3), bias()],
        "float by tiles",
    ),
    "detached table": (
        lambda s, t: s[:, None, None] * distance() + t[distance()].detach().movedim(2, 0),
        [bias(3), bias(13, 3)],
        "float by tiles",
    ),
    "bias of data": (
        lambda x: x[:, None, :, None] * x[:, None, None],
        [bias(2, N)],
        "float by tiles",
    ),
    "learned rows": (lambda x: x @ x.mT, [bias(N, 4)], "dense float"),
}


@pytest.mark.parametrize("name", MASKS)
def test_reads(name: str) -> None:
    make, inputs, expected = MASKS[name]
    assert words(make, *inputs) == expected


def narrow(dtype: torch.dtype, start: int = 0) -> Tensor:
    return arange(start, start + N, dtype=dtype)


U8, I8, I16 = torch.uint8, torch.int8, torch.int16

#: Integers that wrap, or are compared in a dtype that does not hold them; and some that do fit.
WRAPPING: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "uint8 difference": (lambda: narrow(U8)[:, None] - narrow(U8) >= 0, [], "boolean by tiles"),
    "uint8 distance": (lambda: narrow(U8)[:, None] - narrow(U8) <= 2, [], "causal, window 3"),
    "int8 offset": (lambda: narrow(I8)[:, None] + 125 >= narrow(I8) + 125, [], "boolean by tiles"),
    "int8 fits": (lambda: narrow(I8)[:, None] + 5 >= narrow(I8) + 5, [], "causal"),
    "int8 abs": (lambda: (narrow(I8)[:, None] - narrow(I8)).abs() < 3, [], "window -2 to +2"),
    "int8 lowest abs": (
        lambda: (narrow(I8, -128)[:, None] - narrow(I8) * 0).abs() < 3,
        [],
        "boolean by tiles",
    ),
    "uint8 scalar": (lambda: (narrow(U8)[:, None] + narrow(U8)) < 300, [], "boolean by tiles"),
    "uint8 and a number of int64": (
        lambda: narrow(U8)[:, None] < narrow(U8) + torch.tensor(250),
        [],
        "boolean by tiles",
    ),
    "bool sum": (lambda x: x[:, None] + x > 0, [IDS[0] > 0], "boolean by tiles"),
    "uint8 data": (lambda x: x[:, None] - x >= 0, [IDS[0].to(U8)], "boolean by tiles"),
    "uint8 ids": (lambda x: x[:, None] == x, [IDS[0].to(U8)], "documents"),
    "packed int8": (
        lambda x: packed(x),
        [torch.tensor([[125, 126, 127, -128, -127, 0, 1], [5, 6, 7, 7, 8, 1, 2]], dtype=I8)],
        "documents, boolean by tiles",
    ),
    "remainder": (lambda: (arange(N)[:, None] - arange(N)) % 3 == 0, [], "boolean by tiles"),
    "divided": (lambda: arange(N)[:, None] // 2 >= arange(N) // 2, [], "boolean by tiles"),
    "float16 positions": (
        lambda: (2047 + arange(N).half())[:, None] >= 2047 + arange(N).half(),
        [],
        "boolean by tiles",
    ),
}


@pytest.mark.parametrize("name", WRAPPING)
def test_integers_that_wrap(name: str) -> None:
    make, inputs, expected = WRAPPING[name]
    assert words(make, *inputs) == expected


def test_more_keys_than_queries() -> None:
    """ATen's ``is_causal`` starts at the first key, a cache's continuation at a later one."""
    first = words(lambda: arange(9)[None] <= arange(N)[:, None], keys=9)
    last = words(lambda: arange(9)[None] <= arange(N)[:, None] + 2, keys=9)
    assert (first, last) == ("causal", "up to 2 ahead")


# --- any mask of a small grammar ----------------------------------------------------------------

OFFSETS = st.integers(-3, 3)


def compared(op: str, offset: int) -> Callable[..., Tensor]:
    return lambda ids, real, table: getattr(torch, op)(arange(N)[None] + offset, arange(N)[:, None])


LEAVES = st.one_of(
    st.builds(compared, st.sampled_from("le lt ge gt eq ne".split()), OFFSETS),
    st.builds(lambda d: lambda *_: torch.ones(N, N).tril(d).bool(), OFFSETS),
    st.builds(lambda d: lambda *_: torch.ones(N, N, dtype=torch.bool).triu(d), OFFSETS),
    st.sampled_from(
        [
            lambda ids, real, table: same(ids),
            lambda ids, real, table: same(ids) & same(real),
            lambda ids, real, table: packed(ids),
            lambda ids, real, table: real[:, None, None].bool(),
            lambda ids, real, table: real[:, None, :, None] > 0,
            lambda ids, real, table: table,
            lambda ids, real, table: blocks(),
            lambda ids, real, table: ids[:, None, :, None] - 1 <= ids[:, None, None],
        ]
    ),
)


def combined(parts: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(lambda a, b: lambda *x: a(*x) & b(*x), parts, parts),
        st.builds(lambda a, b: lambda *x: torch.logical_or(a(*x), b(*x)), parts, parts),
        st.builds(lambda a: lambda *x: ~a(*x), parts),
        st.builds(lambda a: lambda *x: a(*x).expand(2, 1, N, N), parts),
    )


BOOLEAN = st.recursive(LEAVES, combined, max_leaves=4)


def added_to(make: Callable, fill: float, form: str) -> Callable[..., Tensor]:
    def added(x: Tensor, *inputs: Tensor) -> Tensor:
        mask = make(*inputs)
        if form == "bias":
            return x.masked_fill(~mask, fill)
        if form == "sum":
            return x + torch.where(mask, torch.zeros((), **DOUBLE), fill)
        return torch.where(mask, torch.zeros((), **DOUBLE), fill).expand(2, 3, N, N)

    return added


@settings(max_examples=40)
@given(BOOLEAN)
def test_any_boolean_mask(make: Callable) -> None:
    words(make, IDS, REAL, TABLE)


@settings(max_examples=40)
@given(BOOLEAN, st.sampled_from([-INF, LOW]), st.sampled_from(["bias", "sum", "plain"]))
def test_any_float_mask(make: Callable, fill: float, form: str) -> None:
    words(added_to(make, fill, form), bias(1, 3, N, N), IDS, REAL, TABLE)


# --- the op and its parts -----------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), OFFSETS, OFFSETS)
def test_a_band_is_known_by_its_values(rows: int, columns: int, left: int, right: int) -> None:
    offset = arange(columns)[None] - arange(rows)[:, None]
    seen = (offset >= -left) & (offset <= right)
    band = band_of(seen)
    if not seen.any():
        assert band is None
        return
    assert isinstance(band, Band)
    again = torch.ones_like(seen)
    again &= True if band.left is None else offset >= -band.left
    again &= True if band.right is None else offset <= band.right
    assert torch.equal(again, seen)


def test_the_op_is_attention_under_the_dense_mask() -> None:
    q = torch.randn(2, 3, N, 4, **DOUBLE, requires_grad=True)
    seen = causal() & (arange(N)[:, None] - arange(N) < 3) & same(IDS)
    options = {"is_causal": True, "left": 2, "query_documents": IDS, "key_documents": IDS}
    got = torch.ops.mosaic.sdpa(q, q, q, **options)
    want = F.scaled_dot_product_attention(q, q, q, seen)
    torch.testing.assert_close(got, want)
    (a,), (b,) = (torch.autograd.grad(x.square().sum(), q) for x in (got, want))
    torch.testing.assert_close(a, b)
    compiled = torch.compile(
        lambda x: torch.ops.mosaic.sdpa(x, x, x, **options), backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), want)
    plain = q.detach()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
        assert torch.ops.mosaic.sdpa(fake, fake, fake, left=2).shape == q.shape
