"""Jobs for ``mosaic.parallelize``: models and optimizers as training scripts have them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cases
import torch
import torch.nn.functional as F
from crossing_jobs import Block, Decoder, E
from measure import kept_for_backward
from model_jobs import loss_of
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from walk import strips_of_masks, whole_activations

import mosaic

SPEC = {
    "inputs": {"ids": "batch tokens", "labels": "batch tokens"},
    "axes": {"tokens": mosaic.Auto()},
}


def tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(11, (2, n), generator=draw), torch.randint(11, (2, n), generator=draw)


FSDP: dict[str, Any] = {"fsdp": True, "none": False, "ddp": False}


def parallelized(model: nn.Module, how: str, as_one: bool = False, **options: Any) -> nn.Module:
    """``how``: fsdp, hsdp, ddp or none; ``as_one``: the whole model is one unit, and one graph."""
    mesh = mosaic.get_context().mesh
    fsdp = FSDP.get(how, {"mesh": mesh and mesh["dp", "sp"]})
    spec = mosaic.ShardingSpec(**SPEC)
    options = {"inner": "eager", "blocks": [model] if as_one else None} | options
    model = mosaic.parallelize(model, spec, fully_shard=fsdp, **options)
    return DistributedDataParallel(model) if how == "ddp" else model


def trained(
    p: int, dp: int, how: str, breaks: bool = False, micro: int = 1, **options: Any
) -> dict[str, Any]:
    """Losses, norms and gradients of three steps; with ``dp`` replicas each has its own batches,
    ``micro`` of them a step, and ``p`` = 0 is one process with all of them."""
    torch.manual_seed(0)
    model: Any = Decoder(breaks).double()
    replica = 0
    where = "cpu"
    if p:
        ranks = mosaic.init(sp_size=p)
        replica, where = ranks.dp_rank, str(ranks.device)
        model = parallelized(model.to(where), how, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []
    with mosaic.plans() as plans:
        for step in range(3):
            optimizer.zero_grad()
            mine = [replica] if p else range(dp)
            numbers = [(step * dp + r) * micro + m for m in range(micro) for r in mine]
            found = []
            for at, number in enumerate(numbers):
                with accumulating(model, how if p else "", is_last=at + 1 == len(numbers)):
                    given = (x.to(where) for x in tokens(13, number))
                    loss = model(*given) / len(numbers)
                    loss.backward()
                    found.append(loss.detach())
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            losses.append(sum(found))
    return {
        "losses": losses,
        "norms": norms,
        "gradients": {bare(n): whole(w.grad) for n, w in model.named_parameters()},
        "weights": {bare(n): whole(w.detach()) for n, w in model.named_parameters()},
        "sent": sorted({c.why for plan in plans for c in plan.collectives}),
    }


def accumulating(model: Any, how: str, is_last: bool) -> AbstractContextManager[Any]:
    """Leave out the exchange of gradients of all but the last batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    return model.no_sync() if how == "ddp" and not is_last else nullcontext()


def mixed(p: int) -> dict[str, Any]:
    """bf16 in FSDP2's policy, reduced in float32."""
    torch.manual_seed(0)
    model: Any = Decoder(False)
    if p:
        mosaic.init(sp_size=p)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        spec = mosaic.ShardingSpec(**SPEC)
        fsdp = {"mp_policy": policy}
        model = mosaic.parallelize(model, spec, inner="eager", fully_shard=fsdp)
    model(*tokens(13, 0)).backward()
    return {n: whole(w.grad) for n, w in model.named_parameters()}


def refused() -> dict[str, str]:
    mosaic.init(sp_size=2)
    spec = mosaic.ShardingSpec(**SPEC)
    other = mosaic.ShardingSpec(inputs={"ids": "tokens"}, axes={"tokens": "ring"})
    misspelt = mosaic.ShardingSpec(inputs={"idz": "batch tokens"}, axes={"tokens": "ring"})
    elsewhere = mosaic.ShardingSpec(inputs={"labels": "batch tokens"}, axes={"tokens": "ring"})
    (ids, labels), rank = tokens(13, 0), mosaic.get_context().rank()
    return {
        "no list": said(lambda: mosaic.parallelize(nn.Linear(3, 3), spec)),
        "no part": said(lambda: mosaic.parallelize(Decoder(False), spec, blocks=[nn.Tanh()])),
        "no module": said(lambda: mosaic.parallelize(torch.sin, spec)),
        "no argument": said(lambda: mosaic.parallelize(Decoder(False), misspelt)),
        "none given": said(lambda: mosaic.parallelize(Decoder(False), elsewhere)(ids, None)),
        "other data": said(lambda: mosaic.parallelize(Decoder(False), spec)(ids + rank, labels)),
        "other dims": said(lambda: mosaic.parallelize(Decoder(False), other)(ids, labels)),
    }


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except mosaic.MosaicError as error:
        return str(error)
    return "no error"


def bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# --- what is whole beside what is cut ------------------------------------------------------------


class Cross(nn.Module):
    """A block over tokens that are cut, and a context that is not."""

    def __init__(self):
        super().__init__()
        self.block, self.q, self.kv = Block(False), nn.Linear(E, E), nn.Linear(E, 2 * E)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.block(x)
        k, v = self.kv(context).chunk(2, -1)
        return x + F.scaled_dot_product_attention(self.q(x), k, v)


class TwoStreams(nn.Module):
    """Blocks that see nothing cut, and a parameter that eager code adds to what is."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Block(False) for _ in range(2))
        self.decoder = nn.ModuleList(Cross() for _ in range(2))
        self.embed, self.enter, self.head = nn.Embedding(11, E), nn.Linear(E, E), nn.Linear(E, 11)
        self.positions = nn.Parameter(torch.randn(13, E))

    def forward(self, ids: Tensor, labels: Tensor, context: Tensor) -> Tensor:
        context = self.enter(context)
        for block in self.encoder:
            context = block(context)
        x = self.embed(ids) + self.positions
        for block in self.decoder:
            x = block(x, context)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def two_streams(p: int, how: str = "fsdp") -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = TwoStreams().double()
    context = torch.randn(2, 5, E, dtype=torch.float64)
    if p:
        mosaic.init(sp_size=p)
        model = parallelized(model, how)
    loss = model(*tokens(13, 0), context)
    loss.backward()
    grads = {bare(n): w.grad for n, w in model.named_parameters()}
    return {
        "loss": loss.detach(),
        "gradients": {n: whole(grad) for n, grad in grads.items()},
        "kinds": {type(grad).__name__ for grad in grads.values()},
    }


# --- what a rank holds and sends ----------------------------------------------------------------


def held(p: int, layers: int = 4, n: int = 256) -> dict[str, Any]:
    """Bytes that a rank has of activations for backward, parameters and optimizer, and what its
    third step sends; p = 0 is one process without Mosaic."""
    torch.manual_seed(0)
    model: Any = Decoder(False, layers)
    if p:
        mosaic.init(sp_size=p)
        model = parallelized(model, "fsdp")
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(2 * n).view(2, n) % 11

    def forward() -> Tensor:
        return model(ids, ids)

    for _ in range(2):  # the second one cuts its inputs as the blocks want them
        forward().backward()
        optimizer.step()
    parameters = list(model.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as seen, mosaic.plans() as plans:
        loss, kept = kept_for_backward(forward, [own(w) for w in parameters])
        loss.backward()
    states = [x for state in optimizer.state.values() for x in state.values()]
    return {
        "kept": kept,
        "parameters": sum(size_of(w) for w in parameters),
        "optimizer": sum(size_of(x) for x in states if x.ndim),
        "sent": {e.key: e.count for e in seen.key_averages() if "c10d" in e.key.split("::")[0]},
        "compiled again": len(plans),
    }


def own(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def size_of(x: Tensor) -> int:
    return own(x).numel() * x.element_size()


# --- models of transformers ---------------------------------------------------------------------

LIBRARY = {
    "llama": cases.hf_llama_alone,
    "llama, padding": cases.hf_llama,
    "llama, packed": cases.hf_llama_packed,
    "mistral": cases.hf_mistral,
    "bert": cases.hf_bert,
    "mixtral": cases.hf_mixtral,
}


def broken(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    return call


def library(
    p: int, name: str, breaks: bool = False, how: str = "parallelize", n: int = 37
) -> dict[str, Any]:
    """Loss and gradients of the second step (the first one cuts evenly), and what was planned.
    ``how``: by ``mosaic.parallelize``, or the whole is compiled and its inputs are ShardedTensors.
    """
    torch.manual_seed(0)
    model, _, given = LIBRARY[name](n=n)
    if name != "mixtral":  # whose grouped product takes no float64
        model = model.double()
    for layer in model.model.layers if breaks else ():
        layer.self_attn.forward = broken(layer.self_attn.forward)
        layer.mlp.forward = broken(layer.mlp.forward)
    if p and how == "whole":
        mosaic.init(sp_size=p)
        given = {key: mosaic.distribute(x, 1) for key, x in given.items()}
        model = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    elif p:
        mosaic.init(sp_size=p)
        spec = mosaic.ShardingSpec(
            inputs=dict.fromkeys(given, "batch tokens"), axes={"tokens": "auto"}
        )
        model = mosaic.parallelize(
            model, spec, inner="eager", fully_shard=True, checkpoint=not breaks
        )
    with mosaic.plans() as plans:
        for _ in range(2):
            model.zero_grad()
            loss = loss_of(model(**given))
            loss.backward()
    return {
        "loss": whole(loss.detach()),
        "gradients": {bare(n): whole(w.grad) for n, w in model.named_parameters()},
        "masks": sorted({a.mask for plan in plans for a in plan.attentions}),
        "gathered": sorted({line for plan in plans for line in plan.gathered}),
        "squares": [text for plan in plans for text in squares(plan, n)],
        "strips": strips_of_masks(plans, n, p) if p else [],
        "whole": whole_activations(plans, n) if p > 1 else [],
    }


def lengths(p: int) -> list[Tensor]:
    """Losses on packed texts of two lengths, by one model."""
    torch.manual_seed(0)
    model = cases.hf_llama_packed()[0].double()
    if p:
        mosaic.init(sp_size=p)
        names = ("input_ids", "labels", "position_ids")
        spec = mosaic.ShardingSpec(
            inputs=dict.fromkeys(names, "batch tokens"), axes={"tokens": "auto"}
        )
        model = mosaic.parallelize(model, spec, inner="eager")
    losses = []
    for n in (37, 43):
        torch.manual_seed(n)
        given = cases.hf_llama_packed(1, n)[2]
        losses.append(whole(loss_of(model(**given)).detach()))
    return losses


def squares(plan: mosaic.Plan, n: int) -> list[str]:
    """Tensors with two dims of n: whole masks, whole scores."""
    nodes = [node for graph in plan.graphs.values() for node in graph.nodes]
    shapes = [(node, list(getattr(node.meta.get("val"), "shape", ()))) for node in nodes]
    return [f"{node}: {shape}" for node, shape in shapes if shape.count(n) > 1]
