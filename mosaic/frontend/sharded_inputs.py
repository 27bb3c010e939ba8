"""Inputs that are ShardedTensors: Dynamo's graph has global sizes, the local program takes parts.

x: ShardedTensor f64[2, 13/sp, 8]     Dynamo sees     x: f64[2, 13, 8]
                                      a rank runs     x: f64[2, 7, 8]   (rank 0 of 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mosaic.api.errors import ShardingError, UnsupportedError
from mosaic.layout import Place
from mosaic.partition.context import Context
from mosaic.runtime.deferred_tensor import flattened
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.sharded_tensor import ShardedTensor, with_whole_gradient, wrapped
from mosaic.torch_private import is_alias

#: For the number of an input where each mesh axis cuts it.
Arriving = dict[int, tuple[Place, ...]]
#: Of a graph's output: its global shape and strides, where each mesh axis cuts it, is it a view.
Output = tuple[tuple[list[int], list[int]], tuple[Place, ...], bool]


def arriving_shards(module: fx.GraphModule) -> Arriving:
    """The places of every input that is cut. Dynamo guards them: of other places the program is
    compiled anew."""
    values = flattened(placeholder_values(module))
    return {i: x.places for i, x in enumerate(values) if isinstance(x, ShardedTensor)}


def placeholder_values(module: fx.GraphModule) -> list[Any]:
    """What Dynamo's graph is traced with."""
    return [n.meta.get("example_value") for n in module.graph.find_nodes(op="placeholder")]


def mesh_axes(arriving: Arriving) -> list[str]:
    """The mesh axes that cut inputs."""
    return list({place.mesh_axis: None for places in arriving.values() for place in places})


def check_ranks(arriving: Arriving, ranks: MosaicContext | None) -> None:
    """Raise ShardingError for a tensor that is cut for other ranks than these."""
    for place in (place for places in arriving.values() for place in places):
        p = ranks.size(place.mesh_axis) if ranks else 1
        if place.layout.p != p:
            raise ShardingError(
                f"a ShardedTensor is cut for {place.layout.p} ranks, and mesh axis "
                f"'{place.mesh_axis}' has {p}",
                fix="make it after mosaic.init, and anew after another one",
            )


def part_examples(module: fx.GraphModule, examples: Sequence[Any]) -> list[Any]:
    """What the local program is compiled with: of a ShardedTensor this rank's part (a fake one)."""
    pairs = zip(flattened(placeholder_values(module)), flattened(examples), strict=True)
    return [part_of_fake(x) if isinstance(x, ShardedTensor) else given for x, given in pairs]


def part_of_fake(x: ShardedTensor) -> torch.Tensor:
    with x._local.fake_mode:  # type: ignore[attr-defined]
        part = torch.empty_strided(
            [int(n) for n in x._local.shape],
            [int(n) for n in x._local.stride()],
            dtype=x.dtype,
            device=x.device,
        )
    return part.requires_grad_(x.requires_grad)


def global_shapes(module: fx.GraphModule) -> list[tuple[list[int], list[int]]]:
    """(shape, strides) of the graph's outputs; empty for what is no tensor."""
    values = (
        n.meta.get("example_value") if isinstance(n, fx.Node) else None
        for n in module.graph.output_node().args[0]
    )
    tensors = [x if isinstance(x, torch.Tensor) else None for x in values]
    return [
        ([], []) if x is None else ([int(n) for n in x.shape], [int(n) for n in x.stride()])
        for x in tensors
    ]


def check_writes(context: Context, args: Sequence[Any]) -> None:
    """Raise UnsupportedError for a write to a cut input that another tensor may share."""
    for index in context.mutated:
        x = args[index]
        if isinstance(x, ShardedTensor) and (x.is_view or x.requires_grad):
            raise UnsupportedError(
                f"{context.inputs[index].name} is cut and written to, and "
                + ("is a view of another tensor" if x.is_view else "a gradient flows through it"),
                sizes=list(x.shape),
                fix="make a new tensor instead of writing into this one",
            )


def parts_of(args: Sequence[Any]) -> list[Any]:
    """This rank's parts of a call's arguments."""
    return [x.local if isinstance(x, ShardedTensor) else x for x in args]


def wrapped_outputs(parts: Sequence[Any], outputs: Sequence[Output]) -> Sequence[Any]:
    """Outputs that stay cut as the tensors of the whole program that they are parts of."""
    found = []
    for part, ((shape, stride), places, is_view) in zip(parts, outputs, strict=True):
        if not places:
            found.append(with_whole_gradient(part))
            continue
        found.append(wrapped(part, shape, places, stride))
        found[-1].is_view = is_view
    return found


def share_memory(module: fx.GraphModule) -> list[bool]:
    """Of each output whether another one, or an input, is in the same memory on one device: they
    are apart here, and what is written to one of them would not be seen in the other."""
    nodes = [*module.graph.output_node().args[0], *module.graph.find_nodes(op="placeholder")]
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in nodes]
    held = [x if isinstance(x, torch.Tensor) else None for x in values]
    outputs = held[: len(module.graph.output_node().args[0])]
    return [
        x is not None
        and any(y is not None and i != j and is_alias(x, y) for j, y in enumerate(held))
        for i, x in enumerate(outputs)
    ]
