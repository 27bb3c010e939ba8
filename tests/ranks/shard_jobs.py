"""Jobs for inputs that arrive cut: programs that depend on their length, and models that do not."""

from __future__ import annotations

from collections.abc import Callable

import cases
import contract_cases as cc
import pytest
import torch
import torch.nn.functional as F
from model_jobs import gradients, loss_of
from models.video import Attention, Video
from torch import Tensor, fx, nn

import mosaic
from mosaic.frontend.backend import world_of
from mosaic.frontend.capture import capture, read_inputs
from mosaic.frontend.sharded_inputs import arriving_shards, global_sizes

TOKENS = {"x": "batch tokens features"}


class Decides(nn.Module):
    """What ``decide`` makes of its input, then an attention."""

    def __init__(self, decide: Callable[[Tensor], Tensor]):
        super().__init__()
        self.attention, self.decide = cc.Attention(), decide

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.decide(x if y is None else x * y)
        return self.attention(x).mean()


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = cc.Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        torch._dynamo.graph_break()
        if x.shape[1] > 10:
            y = y * 2
        return y.mean()


def branch(x: Tensor) -> Tensor:
    if x.shape[1] > 6:  # of 13 rows, rank 0 has 7 and rank 1 has 6
        x = x * 2
    return x


def other_branch(x: Tensor) -> Tensor:
    if x.shape[1] > 10:
        x = x * 2
    return x


def loop(x: Tensor) -> Tensor:
    for step in range(x.shape[1]):
        x = x + step
    return x


def whole_number(x: Tensor) -> Tensor:
    return x * len(f"{x.shape[1]}")


def first(x: Tensor) -> Tensor:
    return x[:, :8]


def unchanged(x: Tensor) -> Tensor:
    return x


def bounded(x: Tensor) -> Tensor:
    """Within what the user says of the dim, this is decided without a guard."""
    return x * 2 if x.shape[1] > 10 else x


def refusal(p: int, decide: Callable[[Tensor], Tensor], n: int = 13) -> str:
    """What this rank says of a program that its local length decides."""
    mosaic.init(sp_size=p)
    part = mosaic.shard_tensor(random(n), 1)
    if decide is bounded:
        torch._dynamo.mark_dynamic(part, 1, min=2, max=9)
    return message(Decides(decide).double(), part)


def refusal_of_a_break(p: int) -> str:
    mosaic.init(sp_size=p)
    return message(Breaks().double(), mosaic.shard_tensor(random(13), 1))


def refusal_of_another_input(p: int) -> str:
    """y is cut as well, and the spec does not say so."""
    mosaic.init(sp_size=p)
    parts = [mosaic.shard_tensor(random(13), 1) for _ in range(2)]
    return message(Decides(unchanged).double(), *parts)


def message(model: nn.Module, *parts: Tensor) -> str:
    try:
        compiled(model, TOKENS)(*parts)
    except Exception as error:
        return str(getattr(error, "inner_exception", error))
    return "no error"


def compiled(model: nn.Module, inputs: dict[str, str]) -> Callable[..., Tensor]:
    options = {"inner": "eager", "spec": shards_spec(inputs)}
    return torch.compile(model, backend="mosaic", options=options)


def shards_spec(inputs: dict[str, str]) -> mosaic.ShardingSpec:
    return mosaic.ShardingSpec(inputs=inputs, axes={"tokens": "ring"}, inputs_are="shards")


def random(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    return torch.randn(2, n, cc.E, generator=draw, dtype=torch.float64)


# --- what has to be let through -----------------------------------------------------------------


def holds(x: Tensor) -> Tensor:
    """Decided alike at 7, 6 and 13."""
    n = x.shape[1]
    assert 2 <= n < 100
    return x * (n if n > 3 else 1) / max(n, 2) + int(n) * n**-0.5


def gpt() -> cases.Built:
    model, (ids, labels), _ = cases.gpt()
    return model, (), {"ids": ids, "labels": labels}


def llama() -> cases.Built:
    model, (ids, labels), _ = cases.llama()
    return model, (), {"ids": ids, "labels": labels}


def table() -> cases.Built:
    model, (x, y, split), _ = cases.table(split=8)
    return model, (), {"x": x, "y": y, "split": split}


def video() -> cases.Built:
    return Video(Attention).double(), (), {"clip": torch.randn(1, 13, 6, 3).double()}


def decided() -> cases.Built:
    return Decides(holds).double(), (), {"x": random(13)}


#: A model, and what of its inputs is cut in dim 1.
MODELS = {
    "decided": (decided, TOKENS),
    "gpt": (gpt, {"ids": "batch tokens", "labels": "batch tokens"}),
    "llama": (llama, {"ids": "batch tokens", "labels": "batch tokens"}),
    "table": (table, {"x": "batch tokens columns"}),
    "video": (video, {"clip": "batch tokens places channels"}),
    "hf_llama": (
        cases.hf_llama,
        dict.fromkeys(("input_ids", "labels", "attention_mask"), "batch tokens"),
    ),
}


def captured_lengths(p: int, name: str) -> str:
    """What the parts' lengths are taken for, of a model of which nothing else is run."""
    context = mosaic.init(sp_size=p)
    build, inputs = MODELS[name]
    model, _, given = build()
    spec = shards_spec(inputs)
    found = []

    def stops(module: fx.GraphModule, _: list) -> Callable:
        world = world_of(context, "sp")
        places = arriving_shards(module, read_inputs(module), spec, [world])
        lengths = set(global_sizes(module, places).values())
        found.append(f"{len(places)} inputs of {lengths}")
        capture(module, global_sizes(module, places))
        raise RuntimeError("that is all")

    given = {k: mosaic.shard_tensor(v, 1) if k in inputs else v for k, v in given.items()}
    with pytest.raises(Exception, match="that is all"):
        torch.compile(model, backend=stops)(**given)
    return found[0]


def model_on_parts(p: int, name: str) -> dict:
    """Loss and gradients; p = 0 is the plain model on whole inputs."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, _, given = build()
    called: Callable[..., Tensor] = model
    if p:
        mosaic.init(sp_size=p)
        given = {k: mosaic.shard_tensor(v, 1) if k in inputs else v for k, v in given.items()}
        called = compiled(model, inputs)
    loss = loss_of(called(**given))
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


class Floats(nn.Module):
    """Floats of Python's: under ``dynamic=True`` Dynamo gives them as tensors."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.factor = cc.Attention(), nn.LayerNorm(cc.E), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.attention(x)) * self.factor).pow(3).mean()


def floats_on_parts(p: int, factors: list[float]) -> list[dict]:
    """Loss and gradients with each of these floats; p = 0 is the plain model on whole inputs."""
    torch.manual_seed(0)
    model, x, found = Floats().double(), random(13), []
    called: Callable[..., Tensor] = model
    if p:
        mosaic.init(sp_size=p)
        x = mosaic.shard_tensor(x, 1)
        options = {"inner": "eager", "spec": shards_spec(TOKENS)}
        called = torch.compile(model, backend="mosaic", dynamic=True, options=options)
    for factor in factors:
        model.zero_grad()
        model.factor = factor
        loss = called(x)
        loss.backward()
        found.append({"loss": loss.detach(), "gradients": gradients(model)})
    return found


class CausalLoss(nn.Module):
    """It matters which rows a rank holds."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (y * torch.arange(x.shape[1])[:, None]).square().mean()


def lengths(p: int, wanted: list[int], zigzag: bool) -> list[float]:
    """How far each loss is from that of one process. A length may change on one rank only."""
    mosaic.init(sp_size=p)
    model = CausalLoss()
    called, off = compiled(model, TOKENS), []
    for n in wanted:
        layout = mosaic.Layout.zigzag(n, p) if zigzag else None
        part = mosaic.shard_tensor(random(n), 1, layout=layout)
        off.append((called(part) - model(random(n))).abs().item())
    return off
