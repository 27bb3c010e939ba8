"""The program of one op on ShardedTensors: a graph of that op at global sizes, written for this
rank by ``partition``, and kept for the next call with the same sizes and places."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.user_warnings import gathered_at, user_frame
from mosaic.graph.emit import insert
from mosaic.graph.modes import Modes
from mosaic.layout import Place, Shard
from mosaic.masks.op import ATTENTIONS
from mosaic.partition.context import Context, Output
from mosaic.partition.table import RULES
from mosaic.passes.analyze_masks import analyze_masks
from mosaic.passes.choose_method import choose_method
from mosaic.passes.infer_axes import arriving_axes
from mosaic.passes.normalize import mark_gradients, undo_copies
from mosaic.passes.partition import write
from mosaic.passes.propagate import follow, note_places
from mosaic.passes.raise_loss import raise_loss
from mosaic.passes.rewrite_attention import rewrite_attention
from mosaic.runtime.agreement import COMPARE_OPS, differing
from mosaic.runtime.deferred_tensor import DeferredTensor, Step, flattened, run
from mosaic.runtime.mesh import get_context
from mosaic.runtime.rendezvous import SAME
from mosaic.runtime.sharded_tensor import ShardedTensor, wrapped
from mosaic.runtime.world import world_of
from mosaic.torch_private import FakeTensorMode, pytree

MOST_PROGRAMS = 4096


class Described(NamedTuple):
    """What of a tensor a program depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    places: tuple[Place, ...]
    learns: bool


@dataclass(frozen=True)
class Program:
    """This rank's program of one op. ``outputs``: shape, places and strides of each tensor that it
    gives; ``results``: which of the op's results these are. ``gathered``: what is made whole, and
    why."""

    graph: fx.GraphModule
    outputs: tuple[tuple[torch.Size, tuple[Place, ...], tuple[int, ...]], ...]
    results: Any
    gathered: tuple[str, ...]
    waits_for: str  # the mesh axes whose ranks meet in it, if something whole comes of it
    sends: str  # those whose ranks send each other something in it
    text: str  # what they must have in common then: the op and its sizes

    def run(self, parts: Sequence[Tensor], wrap: Callable[..., Tensor] = ShardedTensor) -> Any:
        """On this rank's parts; ``wrap(part, shape, places, stride)`` makes a cut result."""
        if self.sends:
            self.check_alike()
        for why in self.gathered:
            gathered_at(why)
        return self.wrapped(self.graph(*parts), wrap)

    def with_history(self, *arguments: Any) -> Any:
        """On the parts of a call's arguments, by ops that have a backward of their own."""
        tensors = tensors_of(*arguments)
        return self.run([x.local if isinstance(x, ShardedTensor) else x for x in tensors], wrapped)

    def check_alike(self) -> None:
        """Raise ShardingError where other ranks do not send what this one waits for; they are asked
        once for each op and its sizes."""
        said = differing(get_context(), self.sends, self.text, COMPARE_OPS)
        if said:
            frame = user_frame()
            raise ShardingError(
                "the ranks run different ops on tensors that are cut, or with other sizes",
                where=None if frame is None else str(frame),
                **{f"rank {rank}": text for rank, text in enumerate(said)},
                fix=SAME,
            )

    def wrapped(self, parts: Sequence[Tensor], wrap: Callable[..., Tensor] = ShardedTensor) -> Any:
        """The op's results, of this rank's parts of its outputs."""
        found = [
            wrap(x, shape, places, stride) if places else x
            for x, (shape, places, stride) in zip(parts, self.outputs, strict=True)
        ]
        return pytree.tree_map(lambda i: None if i is None else found[i], self.results)


def tensors_of(*arguments: Any) -> list[Tensor]:
    """The tensors that a program takes, in its order."""
    leaves = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    return flattened(leaves)


def program_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The program for these sizes and places: a new one, or that of an earlier call on the same
    ranks."""
    programs: dict[Any, Program] = get_context().programs
    flat, tree = pytree.tree_flatten((args, kwargs))
    key = (func, str(tree), Modes.current(), *(described(x) for x in flat))
    if key not in programs:
        if len(programs) >= MOST_PROGRAMS:
            programs.clear()
        cuts = ", ".join(cut_text(x) for x in tensors_of(args, kwargs))
        programs[key] = planned(func, args, kwargs, f"{str(func).removesuffix('.default')}({cuts})")
    return programs[key]


def cut_text(x: Tensor) -> str:
    """``[2, 7, 5] with dim 1 as 7=0:4|4:7``."""
    places = x.places if isinstance(x, ShardedTensor) else ()
    cuts = (f"dim {place.dim} as {place.layout}" for place in places)
    return " with ".join([str(list(x.shape)), *cuts])


def described(x: Any) -> Any:
    if isinstance(x, DeferredTensor):
        return (x.steps, *map(described, flattened([x])))
    if not isinstance(x, Tensor):
        return (type(x), x)
    places = x.places if isinstance(x, ShardedTensor) else ()
    shape, stride = (tuple(map(int, sizes)) for sizes in (x.shape, x.stride()))
    return Described(shape, stride, x.dtype, x.device, places, learns(x))


def learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def planned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> Program:
    """Write this rank's program of ``func(*args, **kwargs)``; ``text`` names it."""
    graph, cut = fx.Graph(), {}
    with FakeTensorMode(allow_non_fake_inputs=True):

        def placeholder(x: Tensor) -> fx.Node:
            node = graph.placeholder(f"x_{len(graph.nodes)}")
            shape, stride = ([int(n) for n in sizes] for sizes in (x.shape, x.stride()))
            node.meta["val"] = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
            node.meta["requires_grad"] = learns(x)
            if isinstance(x, ShardedTensor):
                cut[len(graph.nodes) - 1] = x.places
            return node

        nodes = iter([placeholder(x) for x in tensors_of(args, kwargs)])
        first = next(iter(graph.nodes))

        def step(one: Step, args: Any, kwargs: Any) -> fx.Node:
            return insert(graph, first, one.op, args, kwargs)

        def node_of(x: Tensor) -> fx.Node:
            if not isinstance(x, DeferredTensor):
                return next(nodes)
            found: fx.Node = run(x.steps, [next(nodes) for _ in x.leaves], step)
            return found

        args, kwargs = pytree.tree_map_only(Tensor, node_of, (args, kwargs))
        node = insert(graph, first, func, args, kwargs)
    val = node.meta["val"]
    if isinstance(val, Tensor):
        return written(graph, [node], cut, 0, text)
    there = [i for i, x in enumerate(val) if isinstance(x, Tensor)]
    items = [insert(graph, node, operator.getitem, (node, i)) for i in there]
    numbers = (there.index(i) if i in there else None for i in range(len(val)))
    return written(graph, items, cut, type(val)(numbers), text)


def written(
    graph: fx.Graph,
    nodes: list[fx.Node],
    cut: dict[int, tuple[Place, ...]],
    results: Any,
    text: str,
) -> Program:
    vals = [node.meta["val"] for node in nodes]
    shapes, strides = [val.shape for val in vals], [val.stride() for val in vals]
    graph.output(tuple(nodes))
    undo_copies(graph)
    mark_gradients(graph)
    context = context_of(graph, cut)
    raise_loss(graph, context)
    sends = any(node.target in ATTENTIONS for node in graph.nodes)
    if sends:
        analyze_masks(graph, context)
        note_places(follow(graph, context), context)
        choose_method(graph, context)
    for number, axis in enumerate(context.axes):
        sends |= bool(write(graph, context, axis, number).collectives)
    rewrite_attention(graph, context)
    places = [tuple(Shard.decode(text).place for text in texts) for texts in context.output_shards]
    return Program(
        fx.GraphModule(torch.nn.Module(), graph),
        tuple(zip(shapes, places, strides, strict=True)),
        results,
        tuple(why for why, _ in context.gathered),
        waits_for(graph, context, places),
        context.world.mesh_axis if sends else "",
        text,
    )


def waits_for(graph: fx.Graph, context: Context, places: list[tuple[Place, ...]]) -> str:
    meets = any(node.target in RULES.collectives for node in graph.nodes)
    return context.world.mesh_axis if meets and not all(places) else ""


def context_of(graph: fx.Graph, cut: dict[int, tuple[Place, ...]]) -> Context:
    """Of a program whose inputs arrive cut, by the mesh axes that cut them."""
    ranks, meshes = get_context(), {p.mesh_axis for places in cut.values() for p in places}
    context = Context(
        ShardingSpec(),
        world_of(ranks, ",".join(meshes)),
        inputs=(),
        mutated=(),
        modes=Modes.current(),
        arriving=cut,
        stays_cut=True,
        worlds=[world_of(ranks, mesh) for mesh in meshes],
        outputs=(Output(),) * len(graph.output_node().args[0]),
    )
    context.axes = arriving_axes(graph, context)
    return context
