"""Attentions with sinks along every dim of a table: rows, heads, and whole queries."""

from __future__ import annotations

from typing import Any

import torch
from model_jobs import gradients
from torch import Tensor, nn

import mosaic

ROWS, COLUMNS, DIM, LATENTS = 7, 5, 4, 3


class Table(nn.Module):
    """Rows attend with columns as heads, columns with rows as heads, and latents to all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(COLUMNS))
        self.rows = nn.Parameter(torch.randn(ROWS))
        self.of_latents = nn.Parameter(torch.randn(COLUMNS))
        self.latents = nn.Parameter(torch.randn(COLUMNS, LATENTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        x = x + attended(y, y, self.columns).transpose(1, 2)
        x = x + attended(x, x, self.rows)
        return attended(self.latents.expand(len(x), -1, -1, -1), x.transpose(1, 2), self.of_latents)


def attended(q: Tensor, x: Tensor, sinks: Tensor) -> Tensor:
    """(batch, heads, n, dim), in the way of gpt-oss."""
    column = sinks.reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)
    scores = torch.cat([q @ x.mT, column], -1)
    return scores.softmax(-1)[..., :-1] @ x


def run(mesh: dict[str, Any], axes: dict[str, Any], shares: bool = False) -> dict[str, Any]:
    """The result and every gradient, added up where ranks have shares; without a mesh, plainly."""
    torch.manual_seed(0)
    model: Any = Table().double()
    x = torch.randn(2, ROWS, COLUMNS, DIM, dtype=torch.float64, requires_grad=True)
    called = model
    if mesh:
        mosaic.init(**mesh)
        names = {"x": "batch rows columns dim"}
        kind = "shares" if shares else "whole"
        spec = mosaic.ShardingSpec(inputs=names, axes=axes, gradients=kind, on_gather="error")
        options = {"spec": spec, "inner": "eager"}
        called = torch.compile(model, backend="mosaic", options=options)
    with mosaic.plans() as plans:
        out = called(x)
        out.sin().sum().backward()
    if shares:
        for weight in model.parameters():
            torch.distributed.all_reduce(weight.grad)
    masks = {found.mask for plan in plans for found in plan.attentions}
    return {"out": out.detach(), "gradients": {**gradients(model), "x": x.grad}, "masks": masks}
