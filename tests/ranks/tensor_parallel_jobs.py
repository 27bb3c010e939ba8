"""Jobs for tensor parallelism beside a cut sequence: a GPT whose layers ``parallelize_module`` cuts
over a mesh axis of their own."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from parallel_jobs import bare, tokens, whole
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.utils import parametrize

import mosaic

E, D, LAYERS = 16, 4, 1
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
    def __init__(self, kv_heads: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, E), nn.Linear(E, 12)
        self.blocks = nn.ModuleList(Block(kv_heads) for _ in range(LAYERS))

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


def cut_names(plan: str) -> set[str]:
    """The parameters that are cut over the tensor-parallel ranks."""
    inside = [f"{name}.{part}" for name in COLUMNS for part in ("weight", "bias")]
    inside += ["attention.out.weight", "down.weight"]
    found = {f"blocks.{i}.{name}" for i in range(LAYERS) for name in inside}
    return found if plan == "blocks" else found | {"embed.weight", "head.weight", "head.bias"}


CUT = {plan: cut_names(plan) for plan in ("blocks", "embedding, head", "sequence")}


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
            model = torch.compile(model, backend="mosaic", options={"spec": SPEC, "inner": inner})
        else:
            fsdp: Any = {"mesh": mesh["sp"]} if how == "fsdp" else False
            checkpoint = how == "checkpoint"
            options: dict[str, Any] = {"fully_shard": fsdp, "checkpoint": checkpoint}
            model = mosaic.parallelize(model, SPEC, blocks=[*model.blocks], inner=inner, **options)
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
        "parts": sum(is_part(w.grad) for w in model.parameters()),
        "gathered": sorted({line for plan in plans for line in plan.gathered}),
    }


def is_part(grad: Any) -> bool:
    """Whether a gradient is cut over the tensor-parallel ranks, as its parameter is."""
    names = grad.device_mesh.mesh_dim_names if isinstance(grad, DTensor) else ()
    pairs = zip(names, grad.placements, strict=True) if names else ()
    return any(name == "tp" and isinstance(how, Shard) for name, how in pairs)


# --- parameters that are gathered in the graph ---------------------------------------------------


class Gathered(nn.Module):
    """As SimpleFSDP has its parameters: kept in parts, gathered where they are used, and gradients
    averaged over the replicas."""

    def forward(self, weight: Any) -> Tensor:
        whole_one = weight.redistribute(placements=[Replicate()])
        return whole_one.to_local(grad_placements=[Partial("avg")])


def gathered(dp: int, sp: int, axis: str = "dp") -> dict[str, Any]:
    """Loss and gradients of a step; each of ``dp`` replicas has its own batch, and ``sp`` = 0 is
    one process with all of them."""
    torch.manual_seed(0)
    model: Any = Gpt().double()
    numbers = range(dp)
    if sp:
        mesh = mesh_of(("dp", dp), ("sp", sp))
        numbers = [mosaic.init(mesh=mesh).dp_rank]
        for layer in [m for m in model.modules() if [*m.parameters(recurse=False)]]:
            for name, weight in [*layer.named_parameters(recurse=False)]:
                part = distribute_tensor(weight.detach(), mesh[axis], [Shard(0)])
                layer.register_parameter(name, nn.Parameter(part))
                parametrize.register_parametrization(layer, name, Gathered(), unsafe=True)
        model = torch.compile(model, backend="mosaic", options={"spec": SPEC, "inner": "eager"})
    loss: Any = sum(model(*tokens(13, number)) for number in numbers)
    (loss / len(numbers)).backward()
    grads = {bare(n): whole(w.grad) for n, w in model.named_parameters()}
    names = {n.replace("parametrizations.", "").removesuffix(".original"): n for n in grads}
    return {"loss": loss.detach(), "gradients": {n: grads[old] for n, old in names.items()}}


# --- what is refused ----------------------------------------------------------------------------


class Single(nn.Module):
    def __init__(self, out: int):
        super().__init__()
        self.layer = nn.Linear(E, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2


class Scaled(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.scale = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to_local().sum()


def refused() -> dict[str, str]:
    """What a program says whose DTensors are not followed."""
    mesh = mesh_of(("sp", 2), ("tp", 2))
    mosaic.init(mesh=mesh)
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cut = ColwiseParallel()
    sums = RowwiseParallel(input_layouts=Replicate(), output_layouts=Partial())
    return {
        "another mesh": said(Single(E), other["b"], cut),
        "two axes": said(Scaled(mesh), mesh["tp"], None),
        "cut axis": said(Single(E), mesh["sp"], cut),
        "uneven": said(Single(5), mesh["tp"], cut),
        "an output": said(Single(E), mesh["tp"], ColwiseParallel(use_local_output=False)),
        "partial": said(Single(E), mesh["tp"], sums),
    }


def said(model: nn.Module, mesh: DeviceMesh, style: Any) -> str:
    """The error, without the number of the line."""
    parallelize_module(model, mesh, {"layer": style} if style else {})
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    try:
        compiled(torch.randn(2, 6, E))
    except BackendCompilerFailed as error:
        text = str(error).partition("raised:\n")[2].partition("\n\nSet TORCH")[0]
        return re.sub(r"\.py:\d+", ".py", text)
    return "no error"
