"""Jobs for what users do beside the plain call: shards as outputs, shares, decorators, lengths."""

from __future__ import annotations

import os
from pathlib import Path

import cases
import contract_cases as cc
import torch
import torch.nn.functional as F
from model_jobs import gradients

import mosaic

EAGER = {"inner": "eager"}


def sharded_outputs(p: int) -> dict:
    """The loss of logits that stay cut, by torch's own function, outside of the model."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (ids, _), _ = cases.gpt(layers=1)
    spec = mosaic.ShardingSpec(outputs="shards")
    logits, _ = torch.compile(model, backend="mosaic", options={**EAGER, "spec": spec})(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum") / ids.numel()
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": gradients(model),
        "logits": logits.full_tensor().detach(),
        "layout": str(logits.layout_along[1]),
    }


def some_outputs(p: int) -> dict:
    """(logits, loss): the first stays cut. And names that no output has."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (ids, _), _ = cases.gpt(layers=1)
    found = {}
    for outputs in ({0: "shards"}, {1: "shards"}, {"logits": "shards"}):
        spec = mosaic.ShardingSpec(outputs=outputs)
        compiled = torch.compile(model, backend="mosaic", options={**EAGER, "spec": spec})
        try:
            found[str(outputs)] = [type(x).__name__ for x in compiled(ids, ids)]
        except mosaic.ShardingError as error:
            found[str(outputs)] = [str(error)]
    return found


def whole_outputs() -> dict:
    torch.manual_seed(0)
    model, (ids, _), _ = cases.gpt(layers=1)
    logits, _ = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum") / ids.numel()
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model), "logits": logits.detach()}


def shares(p: int, name: str) -> dict:
    """Gradients are shares: their sum over the ranks, taken here, is the gradient."""
    context = mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, args, kwargs = cases.CASES[name][0]()
    spec = mosaic.ShardingSpec(gradients="shares")
    out = torch.compile(model, backend="mosaic", options={**EAGER, "spec": spec})(*args, **kwargs)
    loss = out[-1] if isinstance(out, tuple) else out.square().mean()
    loss.backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad, group=context.group())
    return {"loss": loss.detach(), "gradients": gradients(model)}


def decorated(p: int, what: str) -> dict:
    mosaic.init(sp_size=p)
    decorate = mosaic.shard(
        inputs={"x": "batch tokens features"}, axes={"tokens": "ring"}, inner="eager"
    )
    torch.manual_seed(0)
    kind = type("Model", (cc.Mean,), {"forward": cc.Mean.forward})
    if what == "class":
        kind = decorate(kind)
    model, (x,), _ = cc.built(kind)
    if what == "instance":
        model = decorate(model)
    loss = decorate(lambda x: model(x))(x) if what == "function" else model(x)
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def three_lengths(p: int) -> list[dict]:
    """A second length makes Dynamo's sizes symbolic; each length is specialised."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, _, _ = cases.gpt(layers=1)
    compiled = torch.compile(model, backend="mosaic", options=EAGER)
    return [step(model, compiled, n) for n in (37, 20, 29, 37)]


def three_lengths_plain() -> list[dict]:
    torch.manual_seed(0)
    model, _, _ = cases.gpt(layers=1)
    return [step(model, model, n) for n in (37, 20, 29, 37)]


def step(model, compiled, n: int) -> dict:
    ids = torch.arange(2 * n).view(2, n) % 23
    model.zero_grad()
    loss = compiled(ids, ids)[1]
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def inference(p: int) -> dict:
    """eval and no_grad: no backward graph is made."""
    if p:
        mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (x,), _ = cc.built(cc.Buffers)
    compiled = torch.compile(model, backend="mosaic", options=EAGER) if p else model
    model.eval()
    with torch.no_grad():
        loss = compiled(x)
    with torch.inference_mode():
        again = compiled(x)
    return {"loss": loss, "again": again.clone(), "gradients": {}}


def ambient_autocast(p: int) -> dict:
    if p:
        mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, args, _ = cc.built(cc.Checkpointed, torch.float32)
    compiled = torch.compile(model, backend="mosaic", options=EAGER) if p else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compiled(*args)
    loss.backward()
    return {"loss": loss.detach().float(), "gradients": gradients(model)}


def fused_encoder(p: int, padded: bool) -> dict:
    """How many attentions are cut, and the result, in eval mode and without gradients."""
    if p:
        mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (x,), _ = cc.built(cc.Encoder)
    model.eval()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[0, 9:] = True
    args = (x, padding) if padded else (x,)
    compiled = torch.compile(model, backend="mosaic", options=EAGER) if p else model
    with torch.no_grad():
        return {"loss": compiled(*args), "gradients": {}}


def arriving_shards(p: int, lengths: list[int]) -> list[dict]:
    """Every rank holds its part only; the loss is whole, and so are the parameters' gradients."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, _, _ = cc.built(cc.AnyLength)
    compiled = torch.compile(model, backend="mosaic", options=EAGER)
    return [shard_step(model, compiled, n) for n in lengths]


def shard_step(model, compiled, n: int) -> dict:
    model.zero_grad()
    whole = tokens(n)
    loss = compiled(mosaic.distribute(whole, 1))
    loss.backward()
    return {"loss": loss.detach(), "gradients": {**gradients(model), "x": whole.grad}}


def tokens(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(2, n, cc.E, generator=generator, dtype=torch.float64).requires_grad_()


def whole_steps(lengths: list[int]) -> list[dict]:
    torch.manual_seed(0)
    model, _, _ = cc.built(cc.AnyLength)
    out = []
    for n in lengths:
        model.zero_grad()
        x = tokens(n)
        loss = model(x)
        loss.backward()
        out.append({"loss": loss.detach(), "gradients": {**gradients(model), "x": x.grad}})
    return out


def parts_of_the_user(p: int) -> dict:
    """Cut by hand, and said how."""
    context = mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, _, _ = cc.built(cc.AnyLength)
    compiled = torch.compile(model, backend="mosaic", options=EAGER)
    part = tokens(13).detach().chunk(p, 1)[context.rank()].contiguous().requires_grad_()
    layout = mosaic.Layout.even(13, p)
    loss = compiled(mosaic.ShardedTensor.from_local(part, 1, layout))
    loss.backward()
    assert part.grad is not None
    whole = mosaic.gather(part.grad, 1, layout=layout)
    return {"loss": loss.detach(), "gradients": {**gradients(model), "x": whole}}


def dynamic_norm(p: int) -> dict:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(cc.E), cc.Attention()).double()
    compiled = model
    if p:
        mosaic.init(sp_size=p)
        compiled = torch.compile(model, backend="mosaic", options=EAGER, dynamic=True)
    with mosaic.plans() as plans:
        loss = compiled(tokens(13)).square().mean()
        loss.backward()
    cut = {"cut": [bool(plan.axis) for plan in plans]} if p else {}
    return {"loss": loss.detach(), "gradients": gradients(model), **cut}


class TwoMasks(torch.nn.Module):
    """Causal by a tensor in one attention, and written out in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        position = torch.arange(x.shape[1])
        later = position > position[:, None]
        scores = (q @ k.mT / 3).masked_fill(later, float("-inf"))
        return torch.softmax(scores, -1) @ v + F.scaled_dot_product_attention(q, k, v, ~later)


def without_passes(p: int, off: str) -> dict:
    """The model above with passes that are switched off."""
    torch.manual_seed(0)
    model = TwoMasks().double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    os.environ["MOSAIC_OFF"] = off
    try:
        if p:
            mosaic.init(sp_size=p)
            model = torch.compile(model, backend="mosaic", options=EAGER)
        loss = model(x).square().mean()
        loss.backward()
    finally:
        del os.environ["MOSAIC_OFF"]
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(model).items()}
    return {"loss": loss.detach(), "gradients": found}


def other_ranks_later(p: int) -> tuple[list[int], list[float]]:
    """One compiled model, called with one rank a group and then with all: (ranks, losses)."""
    torch.manual_seed(0)
    model, (x,), _ = cc.built(cc.AnyLength)
    compiled = torch.compile(model, backend="mosaic", options=EAGER)
    with mosaic.plans() as plans:
        alone = mosaic.init(sp_size=1)
        losses = [compiled(x).item()]
        alone.shutdown()
        mosaic.init(sp_size=p)
        losses.append(compiled(x).item())
    return [plan.ranks for plan in plans], [loss - model(x).item() for loss in losses]


def groups_left() -> tuple[int, int]:
    """How many groups, and threads of gloo, stay behind contexts that came and went, though what
    was compiled is kept."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    before, threads_before = len(groups), gloo_threads()
    kept = []
    for mesh in ({"sp_size": 2}, {"mesh_shape": (2, 1), "mesh_axes": ("a", "b")}):
        context = mosaic.init(**mesh)
        context.group(",".join(context.axes))
        method = mosaic.Ring(mesh=context.axes[1])
        spec = mosaic.ShardingSpec(inputs={"x": "b n e"}, axes={"n": method})
        run = torch.compile(attend, backend="mosaic", options={**EAGER, "spec": spec})
        run(torch.ones(1, 4, 2))
        kept.append((context, run))
        context.shutdown()
    return len(groups) - before, gloo_threads() - threads_before


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def gloo_threads() -> int:
    tasks = Path("/proc/self/task")
    return sum("gloo" in (task / "comm").read_text() for task in tasks.iterdir())
