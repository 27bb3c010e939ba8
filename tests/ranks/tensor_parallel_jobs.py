"""Jobs for tensor parallelism beside a cut sequence: a GPT whose layers ``parallelize_module`` cuts
over a mesh axis of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from parallel_jobs import bare, said, tokens, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import mosaic

E, D = 16, 4
SPEC = mosaic.ShardingSpec(
    inputs={"ids": "batch tokens", "labels": "batch tokens"}, axes={"tokens": mosaic.Auto()}
)


class Attention(nn.Module):
    """Its heads are those of this rank: it looks at their dim alone."""

    def __init__(self, kv_heads: int):
        super().__init__()
        self.q, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.k, self.v = nn.Linear(E, kv_heads * D), nn.Linear(E, kv_heads * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kv_heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), Attention(kv_heads)
        self.up, self.down = nn.Linear(E, 3 * E), nn.Linear(3 * E, E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Gpt(nn.Module):
    def __init__(self, kv_heads: int = 2, layers: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, E), nn.Linear(E, 12)
        self.blocks = nn.ModuleList(Block(kv_heads) for _ in range(layers))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


COLUMNS = ("attention.q", "attention.k", "attention.v", "up")
PLAN = {name: ColwiseParallel for name in COLUMNS} | {
    "attention.out": RowwiseParallel,
    "down": RowwiseParallel,
}


def cut_layers(model: Gpt, mesh: Any, plan: str) -> None:
    """``plan``: what is cut beside the products of each block."""
    inside: dict[str, Any] = {name: style() for name, style in PLAN.items()}
    outside: dict[str, Any] = {}
    if plan == "embedding, head":
        outside = {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
    if plan == "sequence":  # as Megatron does: between layers each rank has some tokens
        rows = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
        inside |= {
            "norm": SequenceParallel(),
            "attention": PrepareModuleInput(**rows),
            "attention.out": RowwiseParallel(output_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        outside = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    for block in model.blocks:
        parallelize_module(block, mesh, inside)
    parallelize_module(model, mesh, outside)


@functools.cache
def mesh_of(*axes: tuple[str, int]) -> DeviceMesh:
    """One for all jobs: DTensor's caches keep a mesh, whose groups must not be gone."""
    names, sizes = zip(*axes, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def trained(
    sp: int, tp: int, how: str = "compile", plan: str = "blocks", inner: str = "eager", n: int = 13
) -> dict[str, Any]:
    """Two steps' losses, the second one's gradients and what was planned; ``sp`` = 0 is one
    process without Mosaic."""
    torch.manual_seed(0)
    model: Any = Gpt().double()
    if sp:
        mesh = mesh_of(("sp", sp), ("tp", tp))
        mosaic.init(mesh=mesh)
        cut_layers(model, mesh["tp"], plan)
        if how == "compile":
            model = torch.compile(
                model, backend="mosaic", options={"spec": SPEC, "inner": inner}
            )
        else:
            model = mosaic.parallelize(model, SPEC, inner=inner, fully_shard=FSDP[how](mesh))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with mosaic.plans() as plans:
        for step in range(2):
            optimizer.zero_grad()
            loss = model(*tokens(n, step))
            loss.backward()
            losses.append(loss.detach())
            if not step:
                optimizer.step()
    return {
        "losses": losses,
        "gradients": {bare(n): whole(w.grad) for n, w in model.named_parameters()},
        "kinds": {bare(n): type(w.grad) is DTensor for n, w in model.named_parameters()},
        "gathered": sorted({line for plan in plans for line in plan.gathered}),
        "sent": sorted({(c.axis, c.op) for plan in plans for c in plan.collectives}),
    }


FSDP: dict[str, Any] = {
    "parallelize": lambda mesh: False,
    "fsdp": lambda mesh: {"mesh": mesh["sp"]},
}
