"""Calls that Dynamo runs eagerly or in pieces, where something of them is in parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_jobs import gradients
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mosaic
from mosaic.frontend import backend, user_warnings

E = 8
TOKENS: dict[str, Any] = {"inputs": {"x": "batch tokens features"}, "axes": {"tokens": "ring"}}


def compiled(model: Any, **contract: Any) -> Any:
    options = {"inner": "eager", "spec": mosaic.ShardingSpec(**TOKENS, **contract)}
    return torch.compile(model, backend="mosaic", options=options)


def random(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, E, generator=draw, dtype=torch.float64).requires_grad_()


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        text = str(getattr(error, "inner_exception", error))
        return re.sub(r"\.py:\d+ in", ".py:LINE in", text)
    return "no error"


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Loop(nn.Module):
    """Dynamo gives up a frame that breaks in a loop, and compiles what it calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attend()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x * 2


class BreaksFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x)


class BreaksLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return y


def eager_runs(p: int) -> dict[str, float]:
    """How far each way to go past the compiler is from one process, on a tensor that is cut."""
    mosaic.init(sp_size=p)
    attend = compiled(Attend())
    stance, config = torch.compiler.set_stance, torch._dynamo.config.patch
    ways: list[tuple[str, Callable[[], AbstractContextManager], nn.Module, int]] = [
        ("never compiled", lambda: stance("force_eager"), attend, 8),
        ("compiled", nullcontext, attend, 8),
        ("in a loop", nullcontext, compiled(Loop()), 8),
        ("force_eager", lambda: stance("force_eager"), attend, 8),
        ("eager_on_recompile, compiled", lambda: stance("eager_on_recompile"), attend, 8),
        ("eager_on_recompile", lambda: stance("eager_on_recompile"), attend, 10),
        ("disabled", lambda: config(disable=True), attend, 10),
        ("limit", lambda: config(recompile_limit=1), attend, 12),
        ("break first", nullcontext, compiled(BreaksFirst()), 8),
        ("break last", nullcontext, compiled(BreaksLast()), 8),
    ]
    found = {}
    for name, mode, model, n in ways:
        x = random(n).detach()
        with mode():
            got = model(mosaic.distribute(x, 1))
        factor = 2 if name == "in a loop" else 1
        found[name] = (got.full_tensor() - Attend()(x) * factor).abs().max().item()
    return found


def whole_and_eager(p: int) -> list[str]:
    """Right, and said once."""
    mosaic.init(sp_size=p)
    attend, x = compiled(Attend()), random(8).detach()
    with torch.compiler.set_stance("force_eager"):
        found = [(attend(x) - Attend()(x)).abs().max().item() for _ in range(2)]
    assert found == [0.0, 0.0]
    return [text for text in user_warnings._said if "ran eagerly" in text]


def under_fsdp(p: int) -> list[str]:
    """Dynamo takes no FullyShardedDataParallel whose parameters are flat."""
    mosaic.init(sp_size=p)
    model = FullyShardedDataParallel(Block(), use_orig_params=False, device_id=torch.device("cpu"))
    compiled(model)(random(8)).sum().backward()
    return [text for text in user_warnings._said if "use_orig_params" in text]


# --- gradients that are shares ------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, E * E, dtype=torch.float64).view(E, E))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x @ self.w).sin()


class Returns(Block):
    def __init__(self, what: Callable[[Tensor], Tensor]):
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.what(self.w)


def itself(w: Tensor) -> Tensor:
    return w


def turned(w: Tensor) -> Tensor:
    return w.t()


def copied(w: Tensor) -> Tensor:
    return w.clone()


def shares_of_blocks(p: int) -> dict[str, Tensor]:
    """Blocks that are compiled each, eager work between them: parameters alone give shares."""
    model, x = nn.Sequential(Block(), nn.Tanh(), Returns(copied)), random(7)
    if p:
        context = mosaic.init(sp_size=p)
        model[0], model[2] = (compiled(model[i], gradients="shares") for i in (0, 2))
    out, w = model(x)
    (out.square().sum() + w.square().sum()).backward()
    found = {name.replace("_orig_mod.", ""): w.grad for name, w in model.named_parameters()}
    for grad in found.values() if p else ():
        dist.all_reduce(grad, group=context.group())
    return {**found, "x": x.grad}


def refused_shares(p: int) -> dict[str, str]:
    mosaic.init(sp_size=p)
    ddp = DistributedDataParallel(compiled(Block(), gradients="shares"))
    return {
        "itself": said(lambda: compiled(Returns(itself), gradients="shares")(random(7))),
        "turned": said(lambda: compiled(Returns(turned), gradients="shares")(random(7))),
        "break": said(lambda: compiled(BreaksLast(), gradients="shares")(random(7))),
        "ddp": said(lambda: ddp(random(7))),
        "fsdp": said(lambda: under_fully_shard(Block())(random(7))),
    }


def under_fully_shard(block: nn.Module, factor: float | None = None) -> Any:
    """The block computes shares of its gradients; it is compiled by itself, and FSDP2 wraps it."""
    model = nn.Sequential(compiled(block, gradients="shares"))
    fully_shard(model)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
    return model


def shares_that_are_summed(p: int) -> list[Tensor]:
    """Gradients under FSDP2 that does not divide them; rank 0's parts and the others'."""
    torch.manual_seed(0)
    model: Any = Block()
    if p:
        mosaic.init(sp_size=p)
        model = under_fully_shard(model, factor=1.0)
    model(random(7)).square().mean().backward()
    found = [w.grad for w in model.parameters()]
    return [g.full_tensor() if p else g for g in found]


# --- outputs that stay cut ----------------------------------------------------------------------


class ViewOfInput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.scaled_dot_product_attention(x, x, x), x.unsqueeze(0)


class TwoLayouts(nn.Module):
    """Of 2 tokens, rank 0 has none of ``v`` and rank 1 has all that it has of ``y``."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        v = y[:, 1:]
        return F.scaled_dot_product_attention(y, v, v.sin()), v, y


def outputs_that_stay_cut(p: int, kind: type[nn.Module], n: int) -> dict[str, Tensor]:
    model, x = kind(), random(n)
    if p:
        mosaic.init(sp_size=p)
        model = compiled(model, outputs="shards")
    whole = [out.full_tensor() if p else out for out in model(x)]
    sum((out * out.detach().cos()).sum() for out in whole).backward()
    return {**{str(i): out.detach() for i, out in enumerate(whole)}, "x": x.grad}


def outputs_over_a_break(p: int) -> tuple[str, float]:
    mosaic.init(sp_size=p)
    out, x = compiled(BreaksLast(), outputs="shards")(random(7)), random(7)
    return type(out).__name__, (out.full_tensor() - Attend()(x)).abs().max().item()


# --- inside of another torch.compile ------------------------------------------------------------


def nested(p: int, how: str) -> Tensor:
    """What a function gives that another backend compiles, and that calls one of ours on a part."""
    mosaic.init(sp_size=p)
    inner = compiled(Attend() if how == "module" else Attend().forward)
    outer = torch.compile(lambda x: inner(x) * 2, backend="eager")
    return outer(mosaic.distribute(random(7).detach(), 1)).full_tensor()


# --- DistributedDataParallel ----------------------------------------------------------------------


class Large(nn.Module):
    """More than the first bucket of DistributedDataParallel, 1 MiB."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 12_000), nn.Linear(12_000, E)]).double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x, x, x)
            x = x + self.layers[1](self.layers[0](x).relu())
        return x.square().mean()


def under_ddp(p: int, inside: bool) -> dict[str, Any]:
    """Compiled inside of DDP, or DDP compiled: one graph, cut, right gradients."""
    plans: list[mosaic.Plan] = []
    torch.manual_seed(0)
    model: nn.Module = Large()
    called: Any = model
    if p:
        mosaic.init(sp_size=p)
        backend.LISTENERS.append(plans.append)
        wrapped = DistributedDataParallel(compiled(model) if inside else model)
        called = wrapped if inside else compiled(wrapped)
    loss = called(random(7))
    loss.backward()
    backend.LISTENERS.clear()
    return {
        "loss": loss.detach(),
        "gradients": gradients(model),
        "graphs": [len(plan.attentions) for plan in plans],
        "axis": [plan.axis for plan in plans],
    }
