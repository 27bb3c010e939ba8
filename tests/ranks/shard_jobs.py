"""Jobs for inputs that arrive cut: programs that depend on their length, and models."""

from __future__ import annotations

from collections.abc import Callable

import cases
import contract_cases as cc
import torch
import torch.nn.functional as F
from model_jobs import gradients, loss_of
from models.video import Attention, Video
from torch import Tensor, nn

import mosaic


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
    if x.shape[1] > 7:  # of 13 rows, rank 0 has 7 and rank 1 has 6
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


def on_parts(p: int, model: nn.Module, *whole: Tensor) -> float:
    """How far the loss and the gradients of a program whose first input arrives cut are from those
    of one process, relative to the largest."""
    found = []
    for cut in (False, True):
        leaf = whole[0].clone().requires_grad_()
        given: Tensor = mosaic.distribute(leaf, 1) if cut else leaf
        model.zero_grad()
        loss = (compiled(model) if cut else model)(given, *whole[1:])
        loss.backward()
        grads = [gradients(model)[name] for name, _ in model.named_parameters()]
        found.append([loss.detach(), leaf.grad, *grads])
    pairs = zip(*found, strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in pairs)


def decided(p: int, decide: Callable[[Tensor], Tensor], n: int = 13) -> float:
    mosaic.init(sp_size=p)
    return on_parts(p, Decides(decide).double(), random(n))


def broken(p: int) -> float:
    mosaic.init(sp_size=p)
    return on_parts(p, Breaks().double(), random(13))


def beside_a_whole_one(p: int) -> float:
    """y is as long, and whole."""
    mosaic.init(sp_size=p)
    return on_parts(p, Decides(unchanged).double(), random(13), random(13) + 1)


def refused_ranks(p: int) -> str:
    """A tensor that was cut for other ranks."""
    context = mosaic.init(sp_size=p)
    x = mosaic.distribute(random(13), 1)
    context.shutdown()
    mosaic.init(sp_size=1)
    try:
        compiled(Decides(unchanged).double())(x)
    except Exception as error:
        return str(getattr(error, "inner_exception", error))
    return "no error"


def whole_inside(p: int) -> str:
    """A hook of a module that is compiled in place is compiled with it."""
    mosaic.init(sp_size=p)
    model = nn.Identity()
    model.register_forward_pre_hook(lambda _, args: (mosaic.distribute(args[0], 1),))
    model.register_forward_hook(lambda _, args, out: out.full_tensor())
    model.compile(backend="mosaic", options={"inner": "eager"})
    try:
        model(random(13).sin())
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error)
    raise AssertionError("it ran")


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend="mosaic", options={"inner": "eager"})


def random(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    return torch.randn(2, n, cc.E, generator=draw, dtype=torch.float64)


# --- models -----------------------------------------------------------------


def holds(x: Tensor) -> Tensor:
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


def held() -> cases.Built:
    return Decides(holds).double(), (), {"x": random(13)}


#: A model, and what of its inputs is cut in dim 1.
MODELS = {
    "decided": (held, {"x"}),
    "gpt": (gpt, {"ids", "labels"}),
    "llama": (llama, {"ids", "labels"}),
    "table": (table, {"x"}),
    "video": (video, {"clip"}),
    "hf_llama": (cases.hf_llama, {"input_ids", "labels", "attention_mask"}),
}


def model_on_parts(p: int, name: str) -> dict:
    """Loss and gradients; p = 0 is the plain model on whole inputs."""
    torch.manual_seed(0)
    build, cut = MODELS[name]
    model, _, given = build()
    called: Callable[..., Tensor] = model
    if p:
        mosaic.init(sp_size=p)
        given = {k: mosaic.distribute(v, 1) if k in cut else v for k, v in given.items()}
        called = compiled(model)
    with mosaic.plans() as plans:
        loss = loss_of(called(**given))
        loss.backward()
    grads = {name: whole(x) for name, x in gradients(model).items()}
    return {"loss": whole(loss.detach()), "gradients": grads, "graphs": len(plans)}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, mosaic.ShardedTensor) else x


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
        x = mosaic.distribute(x, 1)
        called = torch.compile(model, backend="mosaic", dynamic=True, options={"inner": "eager"})
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
    """How far each loss is from that of one process. A part may change on one rank only."""
    mosaic.init(sp_size=p)
    model = CausalLoss()
    called, off = compiled(model), []
    for n in wanted:
        layout = mosaic.Layout.zigzag(n, p) if zigzag else None
        x = mosaic.distribute(random(n), 1, layout=layout)
        off.append((called(x) - model(random(n))).abs().item())
    return off
