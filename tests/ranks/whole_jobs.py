"""What ranks do in tests of the eager modules on ShardedTensors: each job gives the largest error
of every case, against the same module in one process on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attention_jobs import difference
from torch import Tensor, nn

import mosaic
from mosaic import Layout

F64 = torch.float64
BACKENDS: tuple[Any, ...] = ("local", "auto", "ring", "ulysses", "all_gather")


class Attention(nn.Module):
    """``mosaic.attention`` behind a layer norm: what it gets is no input of the function."""

    def __init__(self, method: Any = "auto", **options: Any):
        super().__init__()
        self.norm, self.method, self.options = nn.LayerNorm(6), method, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        named = {**self.options, **dict(zip(self.options.get("names", ()), masks, strict=True))}
        named.pop("names", None)
        return mosaic.attention(self.norm(q), k, v, self.method, **named)


class Plain(Attention):
    """The same in plain PyTorch, with the mask ``seen``."""

    def __init__(self, seen: Tensor, scale: float | None = None):
        super().__init__()
        self.seen, self.scale = seen, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.seen
        if mask is not None and mask.is_floating_point():
            seen = torch.where(seen, mask, -torch.inf)
        elif mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        options = {"scale": self.scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(self.norm(q), k, v, seen, **options)


class Flat(mosaic.MultiAxisAttention):
    """Two axes as one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def compared(
    module: nn.Module,
    local: nn.Module,
    whole: Sequence[Tensor],
    dims: Sequence[int | None],
    compiler: str | None,
) -> float:
    """Outputs, gradients of whole inputs and of parameters; dims: where each input is cut."""
    local.load_state_dict(module.state_dict())
    sides = []
    for run, cuts in ((local, [None] * len(whole)), (module, dims)):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in whole]
        given = [
            x if dim is None else mosaic.distribute(x, dim)
            for x, dim in zip(leaves, cuts, strict=True)
        ]
        call: Callable[..., Any] = run
        if run is module and compiler:
            call = torch.compile(run, backend=compiler, options={"inner": "eager"})
        out = call(*given)
        if run is module:
            assert isinstance(out, mosaic.ShardedTensor)
            assert out.layout_along, "what was cut stays cut"
            out = out.full_tensor()
        dout = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
        leaves = [x for x in leaves if x.requires_grad]
        sides.append([out, *torch.autograd.grad(out, [*leaves, *run.parameters()], dout)])
    torch._dynamo.reset()
    return difference(sides[1], sides[0])


def functional(p: int, compiler: str | None) -> dict[str, float]:
    """Causal, windows, masks and documents; fewer KV heads, another value dim; every method."""
    mosaic.init(sp_size=p)
    torch.manual_seed(1)
    n = 13
    whole = [torch.randn(s, dtype=F64) for s in ((2, 4, n, 6), (2, 2, n, 6), (2, 2, n, 3))]
    ids = torch.tensor([[0] * 4 + [1] * 3 + [2] * 6])
    every, same = torch.ones(n, n, dtype=torch.bool), ids[:, :, None] == ids[:, None, :]
    padding, rows = torch.rand(2, 1, 1, n) > 0.3, torch.randn(1, 4, n, n, dtype=F64)
    padding[..., 0] = True
    cases: dict[str, tuple[dict, list[tuple[Tensor, int | None]], Tensor]] = {
        "full": ({}, [], every),
        "causal": ({"causal": True, "scale": 0.3}, [], every.tril()),
        "window": ({"window": (2, 1)}, [], every.tril(1).triu(-2)),
        "padding": ({"causal": True, "names": ["mask"]}, [(padding, None)], every.tril()),
        "cut padding": ({"names": ["mask"]}, [(padding, 3)], every),
        "rows": ({"causal": True, "names": ["mask"]}, [(rows, None)], every.tril()),
        "documents": ({"names": ["query_documents"]}, [(ids, None)], same),
        "cut documents": ({"names": ["query_documents"], "causal": True}, [(ids, 1)], same.tril()),
    }
    errors = {}
    for name, (options, masks, seen) in cases.items():
        local = Plain(seen, options.get("scale")).double()
        tensors, dims = [*whole, *(x for x, _ in masks)], [2, 2, 2, *(dim for _, dim in masks)]
        for method in BACKENDS[1:] if name == "causal" else ("auto",):
            module = Attention(method, **options).double()
            errors[f"{name} {method}"] = compared(module, local, tensors, dims, compiler)
    return errors


def modules(p: int, compiler: str | None) -> dict[str, float]:
    """Each module, cut along the attended axis and along another one."""
    mosaic.init(sp_size=p)
    torch.manual_seed(1)
    x, y = torch.randn(2, 9, 5, 8, dtype=F64), torch.randn(2, 11, 5, 8, dtype=F64)
    qkv = [torch.randn(2, 4, 13, 6, dtype=F64) for _ in range(3)]
    errors = {}

    def case(name: str, build: Callable[[Any], nn.Module], backend: Any, *given: Any) -> None:
        module, local = build(backend).double(), build("local").double()
        errors[f"{name} {backend}"] = compared(module, local, *given, compiler)

    def rows(backend: Any) -> nn.Module:
        return mosaic.MultiAxisAttention(8, 4, 1, backend, causal=True, num_kv_heads=2)

    def cross(backend: Any) -> nn.Module:
        return mosaic.CrossAxisAttention(8, 4, 1, 1, backend)

    def both(backend: Any) -> nn.Module:
        if backend == "local":
            return Flat(8, 4, 1, causal=True)
        return mosaic.MultiAxisAttention2D(8, 4, 1, 2, (p, 1), causal=True)

    for backend in ("local", "ring") if compiler else BACKENDS:
        case("along rows", rows, backend, [x], [1])
    case("beside rows", rows, "ring", [x], [2])
    case("cross", cross, "ring", [x, y], [1, 1])
    case("cross, whole keys", cross, "ring", [x, y], [1, None])
    case("two axes", both, "mesh2d", [x], [1])
    plain = (mosaic.ComposedAttention((1, p), causal=True), mosaic.HierarchicalAttention(1))
    for module in plain:
        seen = torch.ones(13, 13, dtype=torch.bool)
        local = Plain(seen.tril() if module.causal else seen)
        local.norm = nn.Identity()
        name = type(module).__name__
        errors[name] = compared(module, local.double(), qkv, [2, 2, 2], compiler)
    return errors


def refused(p: int) -> list[str]:
    """What is asked of a ShardedTensor as of a shard."""
    mosaic.init(sp_size=p)
    q = mosaic.distribute(torch.randn(1, 2, 6, 4), 2)
    texts = []
    for wrong in (
        lambda: mosaic.attention(q, q, q, layout=Layout.even(6, p)),
        lambda: mosaic.attention(q, q, q, mosaic.Ring(mesh="rows")),
        lambda: mosaic.attention(q, q, q, mosaic.Mesh2D(3, 5)),
        lambda: mosaic.gather(q, 2),
        lambda: mosaic.shard_tensor(q, 1),
    ):
        try:
            wrong()
        except mosaic.ShardingError as error:
            texts.append(str(error))
    return texts
