"""Inputs that are ShardedTensors: Dynamo's graph has global sizes, the local program takes parts.

x: ShardedTensor f64[2, 13/sp, 8]     Dynamo sees     x: f64[2, 13, 8]
                                      a rank runs     x: f64[2, 7, 8]   (rank 0 of 2)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.distributed.tensor import DTensor

from mosaic.api.errors import ShardingError
from mosaic.layout import Place
from mosaic.report.plan import Plan
from mosaic.runtime.deferred_tensor import Recipe, flattened
from mosaic.runtime.mesh import MosaicContext, get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, with_whole_gradient, wrapped
from mosaic.torch_private import is_alias, is_mesh

#: For the number of an input where each mesh axis cuts it.
Arriving = dict[int, tuple[Place, ...]]


class Output(NamedTuple):
    """A tensor that a graph gives (of what is none, only zeros)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    places: tuple[Place, ...]  # where each mesh axis cuts it
    is_shared: bool  # another output, or an input, is in the same memory on one device
    given: int | None = None  # the number of the argument that it is, unchanged or written to
    recipe: Recipe | None = None  # if it is deferred,
    leaves: tuple[Output | int, ...] = ()  # and what stands for it: also arguments, by number


def made(out: Output, args: Sequence[Any], parts: Iterator[Any]) -> Any:
    """An output of a call with ``args``: a tensor of the whole program if it stays cut. Takes from
    the compiled program's ``parts`` what it is made of."""
    if out.recipe is not None:
        leaves = (
            with_whole_gradient(args[x]) if isinstance(x, int) else made(x, args, parts)
            for x in out.leaves
        )
        return out.recipe.of([*leaves])
    part = next(parts)
    if out.given is not None:
        return args[out.given]
    if not out.places:
        return with_whole_gradient(part)
    found = wrapped(part, out.shape, out.places, out.stride)
    found.memory.is_shared = out.is_shared
    return found


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
    module: fx.GraphModule,
    examples: Sequence[Any],
    mutated: Sequence[int],
    arriving: Mapping[int, tuple[Place, ...]],
) -> list[Any]:
    """What the local program is compiled with: of a ShardedTensor this rank's part (a fake one)."""
    values, given = flattened(placeholder_values(module)), flattened(examples)
    pairs = zip(values, given, strict=True)
    parts = [part_example(x, y, arriving.get(i, ())) for i, (x, y) in enumerate(pairs)]
    for i in mutated:
        if isinstance(values[i], ShardedTensor) and values[i].requires_grad:
            parts[i] = parts[i].clone()  # as parts_of does: no leaf
    return parts


def part_example(x: Any, given: Any, places: tuple[Place, ...]) -> Any:
    if isinstance(x, ShardedTensor) and x.bucket is not None:
        return part_of_fake(x, open_part(x, places))
    if isinstance(x, ShardedTensor):
        return part_of_fake(x, x._local)
    if isinstance(x, DTensor):
        return part_of_fake(x, x._local_tensor)
    return 0 if is_mesh(x) else given


def open_part(x: ShardedTensor, places: tuple[Place, ...]) -> torch.Tensor:
    """This rank's part, of which Dynamo has seen nothing."""
    (place,) = places
    rank = get_context().rank(place.mesh_axis)
    sizes = [n if d == place.dim else int(n) for d, n in enumerate(x.shape)]
    with x._local.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(place.local_shape(sizes, rank))


def part_of_fake(x: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    with local.fake_mode:  # type: ignore[attr-defined]
        part = torch.empty_strided(
            [int(n) for n in local.shape],
            [int(n) for n in local.stride()],
            dtype=x.dtype,
            device=x.device,
        )
    return part.requires_grad_(x.requires_grad)


def parts_of(args: Sequence[Any], mutated: Sequence[int]) -> list[Any]:
    """This rank's parts of a call's arguments. One that is written to is copied, if the write must
    reach a history or what else is in its memory: ``write_back`` takes it there."""
    parts = [part_of_argument(x) for x in args]
    for i in mutated:
        if isinstance(args[i], ShardedTensor) and not holds_its_own(args[i]):
            parts[i] = parts[i].clone()
    return parts


def part_of_argument(x: Any) -> Any:
    if isinstance(x, ShardedTensor):
        return x.local if x.bucket is None else x.local.contiguous()  # as open_part says
    if isinstance(x, DTensor):
        return x.to_local()
    return 0 if is_mesh(x) else x


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


def outputs_of(module: fx.GraphModule, plan: Plan) -> list[Output]:
    """What Dynamo's graph gives: where that is cut, and what it is made of if it is deferred."""
    inputs = module.graph.find_nodes(op="placeholder")
    nodes = module.graph.output_node().args[0]
    held = {n: n.meta.get("example_value") for n in (*inputs, *nodes) if isinstance(n, fx.Node)}
    tensors = {n: x for n, x in held.items() if isinstance(x, torch.Tensor)}

    recipes = plan.recipes or [None] * len(nodes)
    new = [[0] if r is None else [x for x in r.leaves if x.given is None] for r in recipes]
    count = sum(map(len, new))
    numbers = [i for i, x in enumerate(placeholder_values(module)) for _ in flattened([x])]
    places = iter(plan.outputs or [()] * count)

    def output(node: Any, recipe: Recipe | None) -> Output:
        if recipe is not None:
            leaves = tuple(
                Output(x.shape, x.stride, next(places), False)
                if x.given is None
                else numbers[x.given]
                for x in recipe.leaves
            )
            return Output((), (), (), False, None, recipe, leaves)
        where = next(places)
        if node not in tensors:
            return Output((), (), where, False)
        x = tensors[node]
        shape, stride = (tuple(int(n) for n in sizes) for sizes in (x.shape, x.stride()))
        is_shared = any(is_alias(x, y) for other, y in tensors.items() if other is not node)
        given = inputs.index(node) if isinstance(x, ShardedTensor) and node in inputs else None
        return Output(shape, stride, where, is_shared, given)

    return [output(n, recipe) for n, recipe in zip(nodes, recipes, strict=True)]
