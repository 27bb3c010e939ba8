"""Inputs that are ShardedTensors: Dynamo's graph has global sizes, the local program takes parts.

x: ShardedTensor f64[2, 13/sp, 8]     Dynamo sees     x: f64[2, 13, 8]
                                      a rank runs     x: f64[2, 7, 8]   (rank 0 of 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.layout import Place
from mosaic.runtime.deferred_tensor import flattened
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.sharded_tensor import ShardedTensor, with_whole_gradient, wrapped
from mosaic.torch_private import is_alias

#: For the number of an input where each mesh axis cuts it.
Arriving = dict[int, tuple[Place, ...]]


class Output(NamedTuple):
    """A tensor that a graph gives (of what is none, only zeros)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    places: tuple[Place, ...]  # where each mesh axis cuts it
    is_shared: bool  # another output, or an input, is in the same memory on one device
    given: int | None = None  # the number of the argument that it is, unchanged or written to


def arriving_shards(module: fx.GraphModule) -> Arriving:
    """The places of every input that is cut. Dynamo guards them: of other places the program is
    compiled anew."""
    values = flattened(placeholder_values(module))
    cut = {i: x.places for i, x in enumerate(values) if isinstance(x, ShardedTensor)}
    return {i: places for i, places in cut.items() if places}


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


def part_examples(
    module: fx.GraphModule, examples: Sequence[Any], mutated: Sequence[int]
) -> list[Any]:
    """What the local program is compiled with: of a ShardedTensor this rank's part (a fake one)."""
    values, given = flattened(placeholder_values(module)), flattened(examples)
    parts = [
        part_of_fake(x) if isinstance(x, ShardedTensor) else y
        for x, y in zip(values, given, strict=True)
    ]
    for i in mutated:
        if isinstance(values[i], ShardedTensor) and values[i].requires_grad:
            parts[i] = parts[i].clone()  # as parts_of does: no leaf
    return parts


def part_of_fake(x: ShardedTensor) -> torch.Tensor:
    with x._local.fake_mode:  # type: ignore[attr-defined]
        part = torch.empty_strided(
            [int(n) for n in x._local.shape],
            [int(n) for n in x._local.stride()],
            dtype=x.dtype,
            device=x.device,
        )
    return part.requires_grad_(x.requires_grad)


def parts_of(args: Sequence[Any], mutated: Sequence[int]) -> list[Any]:
    """This rank's parts of a call's arguments. One that is written to is copied, if the write must
    reach a history or what else is in its memory: ``write_back`` takes it there."""
    parts = [x.local if isinstance(x, ShardedTensor) else x for x in args]
    for i in mutated:
        if isinstance(args[i], ShardedTensor) and not holds_its_own(args[i]):
            parts[i] = parts[i].clone()
    return parts


def write_back(args: Sequence[Any], parts: Sequence[Any], mutated: Sequence[int]) -> None:
    """What the compiled program wrote into parts, into the arguments that they are of."""
    for x, part in ((args[i], parts[i]) for i in mutated):
        if not isinstance(x, ShardedTensor):
            continue
        if holds_its_own(x) and not part.requires_grad:  # nothing with a history was written
            x.memory.writes += 1
        else:
            x.copy_(wrapped(part, x.shape, x.places, x.stride()))


def holds_its_own(x: ShardedTensor) -> bool:
    """Whether a write to x may go to its part behind autograd's back."""
    return x.memory.view is None and not x.memory.is_shared and not x.requires_grad


def outputs_of(module: fx.GraphModule, places: Sequence[tuple[Place, ...]]) -> list[Output]:
    """What Dynamo's graph gives, and where that is cut."""
    inputs = module.graph.find_nodes(op="placeholder")
    nodes = module.graph.output_node().args[0]
    held = {n: n.meta.get("example_value") for n in (*inputs, *nodes) if isinstance(n, fx.Node)}
    tensors = {n: x for n, x in held.items() if isinstance(x, torch.Tensor)}

    def output(node: Any, where: tuple[Place, ...]) -> Output:
        if node not in tensors:
            return Output((), (), where, False)
        x = tensors[node]
        shape, stride = (tuple(int(n) for n in sizes) for sizes in (x.shape, x.stride()))
        is_shared = any(is_alias(x, y) for other, y in tensors.items() if other is not node)
        given = inputs.index(node) if isinstance(x, ShardedTensor) and node in inputs else None
        return Output(shape, stride, where, is_shared, given)

    return [output(n, where) for n, where in zip(nodes, places or [()] * len(nodes), strict=True)]


def wrapped_outputs(
    args: Sequence[Any], parts: Sequence[Any], outputs: Sequence[Output]
) -> list[Any]:
    """Outputs that stay cut as the tensors of the whole program that they are parts of."""
    found = []
    for part, out in zip(parts, outputs, strict=True):
        if out.given is not None:
            found.append(args[out.given])
            continue
        if not out.places:
            found.append(with_whole_gradient(part))
            continue
        found.append(wrapped(part, out.shape, out.places, out.stride))
        found[-1].memory.is_shared = out.is_shared
    return found
