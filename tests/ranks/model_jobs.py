"""What one rank does in the tests of whole models: build, compile, run, give loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mosaic


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def loss_of(out: Any) -> torch.Tensor:
    """A model gives a loss, (logits, loss), an output with .loss, or a tensor to square."""
    if hasattr(out, "loss") and out.loss is not None:
        return out.loss
    if isinstance(out, tuple):
        return out[-1]
    return out if out.ndim == 0 else out.square().mean()


def run_model(
    build: Callable[[], tuple[Any, tuple, dict]], options: dict | None, p: int = 1, **mesh: Any
) -> dict:
    """Loss, gradients and buffers of a model; with ``options`` through Mosaic on p ranks, or on the
    ``mesh`` that ``mosaic.init`` is told."""
    torch.manual_seed(0)
    model, args, kwargs = build()
    called = model
    if options is not None:
        mosaic.init(**(mesh or {"sp_size": p}))
        called = torch.compile(model, backend="mosaic", options=options)
    loss = loss_of(called(*args, **kwargs))
    loss.backward()
    inputs = {
        f"input {i}": a.grad for i, a in enumerate(args) if getattr(a, "requires_grad", False)
    }
    return {
        "loss": loss.detach(),
        "gradients": {**gradients(model), **inputs},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }


def run_by_method(build: Callable[[], tuple[Any, tuple, dict]], options: dict, **mesh: Any) -> dict:
    """The same, with the methods that were planned for the attentions over the cut axis."""
    with mosaic.plans() as plans:
        found = run_model(build, options, **mesh)
    methods = {a.method for plan in plans for a in plan.attentions if a.axis}
    return {**found, "methods": methods}
