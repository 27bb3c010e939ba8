"""One block of attention, and merges of blocks, against autograd through plain math in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.merge import merge

F64 = torch.float64


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
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_name", ["none", "bool", "float", "padding"])
def test_block(mask_name: str, causal: bool, e: int, kv_heads: int, dropout: bool) -> None:
    s, t = (5, 5) if causal else (5, 6)
    q, k, v, dout = tensors(s, t, 4, kv_heads, e)
    mask = masks(s, t)[mask_name]
    keep = (torch.rand(2, 4, s, t) > 0.3).to(F64) / 0.7 if dropout else None
    seen = (
        torch.ones(s, t, dtype=torch.bool).tril() if causal else torch.ones(s, t, dtype=torch.bool)
    )
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

    options = {"causal": causal, "mask": mask, "scale": 0.3, "keep": keep}
    out, lse = kernels.forward(q, k, v, **options)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(lse, want_lse.detach().expand(lse.shape))
    need = bias is not None
    got = kernels.backward(dout, q, k, v, out, lse, **options, need_dmask=need)
    torch.testing.assert_close(got[: 4 if need else 3], grads)


@pytest.mark.parametrize(("s", "t"), [(0, 3), (3, 0), (0, 0)])
def test_empty_block(s: int, t: int) -> None:
    q, k, v, dout = tensors(s, t, 4, 2)
    options = {"causal": False, "mask": None, "scale": 1.0, "keep": None}
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
        out, lse = kernels.forward(q, k, v, causal=False, mask=mask, scale=0.5, keep=None)
        assert lse.dtype == torch.float32
        exact = plain(q.double(), k.double(), v.double(), torch.ones(5, 6) > 0, None, 0.5, None)[0]
        torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_merge_of_parts_is_the_whole_and_empty_parts_weigh_nothing() -> None:
    q, k, v, _ = tensors(5, 9, 4, 2)
    options = {"causal": False, "scale": 0.5, "keep": None}
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
