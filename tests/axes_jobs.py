"""What one rank does in the tests of several mesh axes."""

from __future__ import annotations

import axes_cases
import torch
from model_jobs import gradients, loss_of

import mosaic


def run(
    name: str,
    spec: mosaic.ShardingSpec | None = None,
    shape: tuple[int, ...] = (),
    axes: tuple[str, ...] = (),
) -> dict:
    """Loss and all gradients of a model of ``axes_cases``; with a mesh through Mosaic."""
    torch.manual_seed(0)
    model, args, kwargs = axes_cases.CASES[name]()
    called = model
    if shape:
        mosaic.init(None, mesh_shape=shape, mesh_axes=axes)
        options = {"inner": "eager", "spec": spec}
        called = torch.compile(model, backend="mosaic", options=options)
    group = mosaic.get_context().group("r,c") if spec and spec.gradients == "shares" else None
    loss = loss_of(called(*args, **kwargs))
    loss.backward()
    if group is not None:
        for x in (x for x in model.parameters() if x.grad is not None):  # inputs' are whole
            torch.distributed.all_reduce(x.grad, group=group)
    return {
        "loss": loss.detach(),
        "gradients": {**gradients(model), "x": args[0].grad},
        "buffers": dict(model.named_buffers()),
    }
