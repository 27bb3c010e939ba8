"""What one rank does in the tests of masks that are known when compiling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from known_masks import MASKS, attends

import mosaic
from mosaic.api.methods import AllGather, Hierarchical, Mesh2D, Method, Ring, Ulysses


def methods(p: int) -> Iterator[Method]:
    yield from (Ring(stages=p), AllGather(), Ulysses())
    if p > 3:
        yield from (Ring(stages=2), Mesh2D(p // 2, 2), Mesh2D(2, p // 2))
        yield from (Hierarchical(2, intra) for intra in ("local", "ring", "ulysses"))


def differences(p: int, every: int) -> dict[str, float]:
    """How far outputs and gradients are from plain PyTorch's, of each ``every``th case."""
    mosaic.init(sp_size=p)
    cases = [(name, method) for name in MASKS for method in methods(p)]
    return {f"{name} {method}": difference(name, method, p) for name, method in cases[::every]}


def difference(name: str, method: Method, p: int) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    shapes = [(2, heads, 16 * p, 4) for heads in (8, 4, 4)]
    qkv = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    spec = mosaic.ShardingSpec(inputs=dict.fromkeys("qkv", "batch heads n dim"), axes={"n": method})

    def loss(fn) -> list[torch.Tensor]:
        out = fn(*qkv)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad((out * weight).sum(), qkv)]

    options = {"spec": spec, "inner": "eager"}
    compiled = torch.compile(attends(name), backend="mosaic", options=options)
    pairs = zip(loss(compiled), loss(attends(name)), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
