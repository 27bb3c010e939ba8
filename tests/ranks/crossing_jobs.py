"""Jobs for programs of many graphs: what is cut stays cut between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from model_jobs import gradients
from torch import Tensor, nn

import mosaic
from mosaic.report.plan import plans

E = 16


class Attention(nn.Module):
    def __init__(self, breaks: bool, causal: bool = True):
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.breaks, self.causal = breaks, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, breaks: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), Attention(breaks)
        self.up, self.down, self.breaks = nn.Linear(E, 2 * E), nn.Linear(2 * E, E), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Ids to a loss: an embedding, blocks that may break, a head."""

    def __init__(self, breaks: bool):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, E), nn.Linear(E, 11)
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    return torch.randint(11, (2, n), generator=draw), torch.randint(11, (2, n), generator=draw)


def compiled(fn: Any, **spec: Any) -> Any:
    options = {"inner": "eager", "spec": mosaic.ShardingSpec(**spec)}
    return torch.compile(fn, backend="mosaic", options=options)


def decoder(p: int, how: str, breaks: bool, cut: bool = True) -> dict[str, Any]:
    """Loss, gradients and plans; ``how``: the whole is compiled, or every block, or neither.
    p = 0 is one process without Mosaic."""
    torch.manual_seed(0)
    model = Decoder(breaks).double()
    called: Callable[..., Tensor] = model
    ids, labels = tokens(13)
    if p:
        mosaic.init(sp_size=p)
        if cut:
            ids, labels = (mosaic.distribute(x, 1) for x in (ids, labels))
        if how == "whole":
            called = compiled(model)
        for block in model.blocks if how == "blocks" else ():
            block.forward = compiled(block.forward)
    with plans() as found:
        loss = called(ids, labels)
        loss.backward()
    whole = {name: full(grad) for name, grad in gradients(model).items()}
    return {
        "loss": full(loss.detach()),
        "gradients": whole,
        "graphs": len(found),
        "gathered": [line for plan in found for line in plan.gathered],
        "axes": [plan.axis for plan in found],
    }


def full(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, mosaic.ShardedTensor) else x
