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


class Table(axes_cases.InTurn):
    """The cells themselves, of any number of rows and columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(self.embed(x.unsqueeze(-1)))


def from_shards_to_shards(rows: int, columns: int) -> dict:
    """Both axes arrive cut and stay cut: no rank sees the table."""
    torch.manual_seed(0)
    model, (x,), _ = axes_cases.built(Table, rows, columns)
    want = model(x)
    grads = torch.autograd.grad(want.square().sum(), [x, *model.parameters()])
    mosaic.init(None, mesh_shape=(2, 2), mesh_axes=("r", "c"))
    spec = mosaic.ShardingSpec(
        inputs={"x": "batch rows columns"},
        axes={"rows": mosaic.Ring(mesh="r"), "columns": mosaic.AllGather(mesh="c")},
    )
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager", "spec": spec})
    out = compiled(mosaic.distribute(mosaic.distribute(x, 1, mesh="r"), 2, mesh="c"))
    whole = out.full_tensor()
    whole.square().sum().backward()
    got = [whole, x.grad, *(p.grad for p in model.parameters())]
    differences = [(a - b).abs().max() for a, b in zip(got, [want, *grads], strict=True)]
    return {
        "size": list(out.local.shape),
        "layouts": [str(out.layout_along[dim]) for dim in (1, 2)],
        "error": float(max(differences)),
    }
