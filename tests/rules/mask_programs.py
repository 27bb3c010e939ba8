"""Programs that make masks, and what ``analyze_masks`` turns an attention under them into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mosaic.masks.op import ATTENTIONS
from mosaic.passes.analyze_masks import analyze_masks
from mosaic.torch_private import FakeTensorMode, aot_export_module

MakeMask = Callable[..., Tensor | None]


def attended(make: MakeMask, queries: int = 7, keys: int = 7, batch: int = 2) -> tuple[Any, ...]:
    """(program, its q, k, v) of an attention of 3 heads under the mask that ``make`` makes."""
    torch.manual_seed(0)

    def program(q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, make(*inputs))

    shapes = [(batch, 3, n, 4) for n in (queries, keys, keys)]
    return program, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def traced(program: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """As ``mosaic.frontend.capture`` traces."""

    class Program(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Any]:
            return (program(*given),)

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in args]
    module, _ = aot_export_module(Program(), fakes, trace_joint=False, pre_dispatch=True)
    given = iter(args)
    for node in module.graph.nodes:
        ends = node.target == torch.ops.aten.detach.default or not is_float(node)
        into = any(n.meta.get("needs_gradient") for n in node.all_input_nodes)
        is_input = node.op == "placeholder"
        node.meta["needs_gradient"] = next(given).requires_grad if is_input else into and not ends
    return module


def is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point()


def read(program: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """The program with its masks read."""
    module = traced(program, *args)
    analyze_masks(module.graph, None)
    module.graph.lint()
    module.recompile()
    return module


def attention_of(module: fx.GraphModule) -> fx.Node:
    (node,) = [n for n in module.graph.nodes if n.target in ATTENTIONS]
    return node


def words(make: MakeMask, *inputs: Tensor, **sizes: int) -> str:
    """What is read of a mask; the result and every gradient must be what they were."""
    program, tensors = attended(make, **sizes)
    module = read(program, *tensors, *inputs)
    leaves = [*tensors, *(x for x in inputs if x.requires_grad)]
    results = []
    for out in (program(*tensors, *inputs), *module(*tensors, *inputs)):
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append([out, *grads])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13, equal_nan=True)
    return attention_of(module).meta["mask"]
