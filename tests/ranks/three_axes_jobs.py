"""Jobs for a mesh of three axes: replicas with batches of their own, a cut sequence, and layers
that ``parallelize_module`` cuts."""

from __future__ import annotations

from typing import Any

import torch
from parallel_jobs import bare, tokens, whole
from tensor_parallel_jobs import SPEC, Gpt, cut_layers, is_part, mesh_of

import mosaic

N = 13


def trained(dp: int, sp: int, tp: int, how: str = "", plan: str = "blocks") -> dict[str, Any]:
    """Two steps: losses, and the second one's gradients, which are the mean over replicas.

    ``how``: "compile", "parallelize", "fsdp" over replicas and sequence as one axis, or "hsdp";
    without it one process has the batches of all replicas. Who has no FSDP2 sums gradients itself.
    """
    torch.manual_seed(0)
    model: Any = Gpt().double()
    replicas, mesh = list(range(dp)), None
    if how:
        mesh = mesh_of(("dp", dp), ("sp", sp), ("tp", tp))
        replicas = [mosaic.init(mesh=mesh).dp_rank]
        cut_layers(model, mesh["tp"], plan)
        model = applied(model, mesh, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss: Any = sum(model(*tokens(N, dp * step + r)) for r in replicas) / len(replicas)
        loss.backward()
        if how in ("compile", "parallelize"):
            averaged(model, mesh)
        losses.append(loss.detach())
        if not step:
            optimizer.step()
    return {
        "losses": losses,
        "gradients": {bare(n): whole(w.grad) for n, w in model.named_parameters()},
        "parts": sum(is_part(w.grad) for w in model.parameters()),
    }


def applied(model: Any, mesh: Any, how: str) -> Any:
    if how == "compile":
        return torch.compile(model, backend="mosaic", options={"spec": SPEC, "inner": "eager"})
    shards: Any = {"parallelize": False, "fsdp": True, "hsdp": {"mesh": mesh["dp", "sp"]}}[how]
    return mosaic.parallelize(
        model, SPEC, inner="eager", blocks=[*model.blocks], fully_shard=shards
    )


def averaged(model: Any, mesh: Any) -> None:
    """As a reducer over the replicas leaves gradients."""
    for w in model.parameters():
        grad = getattr(w.grad, "_local_tensor", w.grad)
        torch.distributed.all_reduce(grad, group=mesh["dp"].get_group())
        grad.div_(mesh["dp"].size())
