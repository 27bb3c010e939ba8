"""What one rank does in the tests of attentions written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from handwritten import ATTENTIONS, N
from torch import Tensor

import mosaic

INPUTS = {name: "batch heads n dim" for name in "qkv"}


def differences(p: int, names: Sequence[str]) -> dict[str, float]:
    """How far output and gradients are from plain PyTorch's, at most."""
    mosaic.init(sp_size=p)
    spec = mosaic.ShardingSpec(inputs=INPUTS, axes={"n": "ring"})
    return {name: difference(name, spec) for name in names}


def difference(name: str, spec: mosaic.ShardingSpec) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, N, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    pad = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1], [1] * N], dtype=torch.bool)
    compiled = torch.compile(
        ATTENTIONS[name], backend="mosaic", options={"spec": spec, "inner": "eager"}
    )
    ours, theirs = (with_gradients(fn, qkv, pad) for fn in (compiled, ATTENTIONS[name]))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def with_gradients(fn, qkv: list[Tensor], pad: Tensor) -> list[Tensor]:
    out = fn(*qkv, pad)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]
