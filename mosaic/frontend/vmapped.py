"""``torch.vmap`` in a model: Dynamo writes what is in it for one sample, between two marks.

    begin(batch_size); r = add_batch_dim(x, 0); y = f(r); out = remove_batch_dim(y, 0); end()

Functorch gives each op its mapped dim below the point where a program is captured. So such a region
is traced by itself first, at the sizes at hand, to plain ops on tensors with all their dims.
Gradients are those of the plain ops: the region is traced without any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import UnsupportedError
from mosaic.graph import regions
from mosaic.graph.source import frames, where
from mosaic.torch_private import (
    VMAP_BEGINS,
    VMAP_ENDS,
    VMAP_PARTS,
    VMAP_PREPARES,
    FakeTensorMode,
    autograd_function_apply,
    enter_autocast,
    functorch_restored,
    is_of_functorch,
    make_fx,
    pytree,
    set_grad_enabled,
    tag_activation_checkpoint,
    without_modes,
)

#: What plain ops do not say, and how users write it.
BEYOND = {
    autograd_function_apply: "a torch.autograd.Function",
    enter_autocast: "torch.autocast",
    set_grad_enabled: "a change between no_grad and enable_grad",
    tag_activation_checkpoint: "torch.utils.checkpoint",
}


class Region:
    """The nodes of an outermost ``torch.vmap``, as they are read."""

    def __init__(self) -> None:
        self.nodes: list[fx.Node] = []
        self.depth = 0

    def takes(self, node: fx.Node) -> bool:
        """Whether the node belongs to the region; then it is kept. ``depth`` 0 ends the region."""
        if node.target is not VMAP_BEGINS and not self.depth:
            return node.target is VMAP_PREPARES
        self.depth += (node.target is VMAP_BEGINS) - (node.target is VMAP_ENDS)
        self.nodes.append(node)
        return True

    def results(self) -> list[fx.Node]:
        """Those that are used outside."""
        return [*regions.Region.of(self.nodes).outputs]

    def operands(self) -> list[fx.Node]:
        """Those outside that are used."""
        return [*regions.Region.of(self.nodes).operands]


def written_out(region: Region, module: fx.GraphModule, values: list[Any]) -> fx.GraphModule:
    """The region as plain ops, from its operands (``values``) to its results."""
    graph, copies = fx.Graph(), {}
    for node in region.operands():
        copies[node] = graph.placeholder(node.name)
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[n] for n in region.results()])
    return as_plain_ops(fx.Interpreter(fx.GraphModule(module, graph)).run, values)


def as_plain_ops(run: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """What ``run`` does to values like these, below all modes, with what is mapped written out."""
    with without_modes(), functorch_restored(), FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(run)(*pytree.tree_map_only(torch.Tensor, _blank, tuple(values)))


def _blank(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def check_transforms(module: fx.GraphModule) -> None:
    """Raise UnsupportedError for transforms of torch.func other than vmap, and for what a vmap
    holds that would not be what it is on one device."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _check_graph(part.graph)


def _check_graph(graph: fx.Graph) -> None:
    region = Region()
    for node in graph.nodes:
        inside = region.takes(node)
        if node.target is VMAP_BEGINS and node.args[1] != "error":
            raise _refused(f"torch.vmap with randomness={node.args[1]!r}", node)
        if is_of_functorch(node.target) and node.target not in VMAP_PARTS:
            raise _refused("a transform of torch.func other than vmap", node)
        if inside and node.target in BEYOND:
            raise _refused(f"{BEYOND[node.target]} inside of torch.vmap", node)


def _refused(title: str, node: fx.Node) -> UnsupportedError:
    while not frames(node) and node.op != "output":  # marks have no line of their own
        node = node.next
    return UnsupportedError(
        title,
        where=where(node),
        fix="do it outside of the compiled function, or with dims that broadcast",
    )
