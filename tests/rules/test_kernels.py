"""One block of attention, and merges of blocks, against autograd through plain math in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.attend import attend, attend_backward
from mosaic.attention.blocks import CAUSAL, Band
from mosaic.attention.merge import merge
from mosaic.attention.visit import Visit
from mosaic.layout import Layout

F64 = torch.float64
FULL = (None, None)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None,
):
    """out and lse, with ``seen`` (s, t) boolean; rows that see nothing give 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    scores = scores.masked_fill(~seen, -1e300)
    weights = scores.softmax(-1) * seen
    out = (weights if keep is None else weights * keep) @ v
    return out, scores.logsumexp(-1).masked_fill(~seen.any(-1), float("-inf"))


def in_band(s: int, t: int, band: tuple[int | None, int | None]) -> Tensor:
    lower, upper = band
    ahead = torch.arange(t) - torch.arange(s)[:, None]
    return (ahead >= (-s if lower is None else lower)) & (ahead <= (t if upper is None else upper))


def tensors(s: int, t: int, heads: int, kv_heads: int, e: int = 4, dtype=F64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, s, 4), (2, kv_heads, t, 4), (2, kv_heads, t, e), (2, heads, s, e)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def masks(s: int, t: int) -> dict[str, Tensor | None]:
    seen = torch.rand(2, 1, s, t) > 0.4
    seen[:, :, 0] = False
    bias = torch.randn(1, 4, s, t, dtype=F64)
    bias[:, :, 1 % s] = float("-inf")
    padding = torch.arange(t).expand(2, 1, 1, t) < torch.tensor([3, 0]).view(2, 1, 1, 1)
    return {"none": None, "bool": seen, "float": bias, "padding": padding}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("e", [4, 3])
@pytest.mark.parametrize("band", [(None, None), (None, 0), (-2, 0), (-3, 1), (0, None)])
@pytest.mark.parametrize("mask_name", ["none", "bool", "float", "padding"])
def test_block(mask_name: str, band, e: int, kv_heads: int, dropout: bool) -> None:
    s, t = (5, 5) if band == (None, 0) else (5, 6)
    q, k, v, dout = tensors(s, t, 4, kv_heads, e)
    mask = masks(s, t)[mask_name]
    keep = (torch.rand(2, 4, s, t) > 0.3).to(F64) / 0.7 if dropout else None
    seen = in_band(s, t, band)
    bias = mask if mask_name == "float" else None
    if bias is not None:
        seen = seen & (bias > float("-inf"))
        bias = bias.clone().requires_grad_()
    elif mask is not None:
        seen = seen & mask
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = plain(
        *inputs, seen, None if bias is None else bias.clamp(min=-1e300), 0.3, keep
    )
    grads = torch.autograd.grad(want, [*inputs, *([] if bias is None else [bias])], dout)

    options = {"band": band, "mask": mask, "scale": 0.3, "keep": keep}
    out, lse = kernels.forward(q, k, v, **options)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(lse, want_lse.detach().expand(lse.shape))
    need = bias is not None
    got = kernels.backward(dout, q, k, v, out, lse, **options, need_dmask=need)
    torch.testing.assert_close(got[: 4 if need else 3], grads)


@pytest.mark.parametrize(("s", "t"), [(0, 3), (3, 0), (0, 0)])
def test_empty_block(s: int, t: int) -> None:
    q, k, v, dout = tensors(s, t, 4, 2)
    options = {"band": FULL, "mask": None, "scale": 1.0, "keep": None}
    out, lse = kernels.forward(q, k, v, **options)
    assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
    grads = kernels.backward(dout, q, k, v, out, lse, **options)[:3]
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(
        g.any() for g in grads
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_float32_lse(dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(5, 6, 4, 2, dtype=dtype)
    for mask in (None, torch.ones(1, 1, 5, 6, dtype=torch.bool)):
        out, lse = kernels.forward(q, k, v, band=FULL, mask=mask, scale=0.5, keep=None)
        assert lse.dtype == torch.float32
        exact = plain(q.double(), k.double(), v.double(), torch.ones(5, 6) > 0, None, 0.5, None)[0]
        torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_merge_of_parts_is_the_whole_and_empty_parts_weigh_nothing() -> None:
    q, k, v, _ = tensors(5, 9, 4, 2)
    options = {"band": FULL, "scale": 0.5, "keep": None}
    mask = torch.rand(1, 1, 5, 9) > 0.5
    mask[:, :, 2] = False
    cuts = [(0, 4), (4, 4), (4, 7), (7, 9)]
    parts = [
        kernels.forward(q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], **options)
        for a, b in cuts
    ]
    whole = kernels.forward(q, k, v, mask=mask, **options)
    torch.testing.assert_close(merge(parts), whole)
    torch.testing.assert_close(merge([merge(parts[:2]), merge(parts[2:])]), whole)


@pytest.mark.parametrize("layout", [Layout.even(22, 3), Layout.zigzag(22, 3)], ids=str)
@pytest.mark.parametrize("band", [CAUSAL, Band(4, 0), Band(2, 3), Band(9, None)], ids=str)
def test_blocks_of_a_band_add_up(layout: Layout, band: Band) -> None:
    q, k, v, dout = tensors(22, 22, 4, 2)
    order = [i for rank in range(3) for i in layout.indices(rank)]
    low, high = (None if b is None else sign * b for b, sign in zip(band, (-1, 1), strict=True))
    seen = in_band(22, 22, (low, high))[order][:, order]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    want, _ = plain(*inputs, seen, None, 0.5, None)
    grads = torch.autograd.grad(want, inputs, dout)

    cuts = [slice(sum(layout.lengths[:r]), sum(layout.lengths[: r + 1])) for r in range(3)]
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for mine, rows in zip(layout.ranks, cuts, strict=True):
        visits = [Visit(mine, theirs, band, 0.5) for theirs in layout.ranks]
        q_here, dout_here = q[:, :, rows], dout[:, :, rows]
        partial = None
        for here, columns in zip(visits, cuts, strict=True):
            partial = attend(q_here, k[:, :, columns], v[:, :, columns], here, partial)
        torch.testing.assert_close(partial[0], want[:, :, rows].detach())
        for here, columns in zip(visits, cuts, strict=True):
            visiting = (q_here, k[:, :, columns], v[:, :, columns])
            dq, dk, dv, *_ = attend_backward(dout_here, *visiting, *partial, here, False)
            found[0][:, :, rows] += dq
            found[1][:, :, columns] += dk
            found[2][:, :, columns] += dv
    torch.testing.assert_close(found, list(grads))


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("band", [FULL, (None, 0), (-2, 0)])
@pytest.mark.parametrize("mask_name", ["none", "bool", "float", "padding"])
def test_any_scale_and_stride(mask_name: str, band, scale: float) -> None:
    """Head dims with a stride, and scales of any sign: no kernel may read or order them wrongly."""
    given = [x.mT.contiguous().mT for x in tensors(5, 5, 4, 2)]
    assert all(x.stride(-1) != 1 for x in given)
    mask = masks(5, 5)[mask_name]
    seen = in_band(5, 5, band)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > float("-inf"))
    bias = mask.clamp(min=-1e300) if mask_name == "float" else None
    inputs = [x.clone().requires_grad_() for x in given[:3]]
    want, want_lse = plain(*inputs, seen, bias, scale, None)
    grads = torch.autograd.grad(want, inputs, given[3])

    options = {"band": band, "mask": mask, "scale": scale, "keep": None}
    out, lse = kernels.forward(*given[:3], **options)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(lse, want_lse.detach().expand(lse.shape))
    got = kernels.backward(given[3], *given[:3], out, lse, **options)
    torch.testing.assert_close(got[:3], grads)
