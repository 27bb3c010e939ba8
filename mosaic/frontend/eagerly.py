"""Ops on ShardedTensors without torch.compile: each is a program of one op, cut by the same rules.

    y = x @ w        # x f64[2, 13/sp, 8], w whole
    ->   a graph of one ``mm`` at global sizes, written for this rank by ``partition``; kept, and
         run whenever the same op comes with the same sizes and places

Autograd works above this, on global tensors: its formulas are ops as well. So gradients are those
of one device without a word about them here.
"""

from __future__ import annotations

import logging
import operator
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mosaic.api.errors import ShardingError, UnsupportedError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.deferred import deferred
from mosaic.graph.emit import insert
from mosaic.graph.modes import Modes
from mosaic.graph.source import Frame, frames_of
from mosaic.graph.unexpected import DATA_DEPENDENT
from mosaic.layout import Place, Shard
from mosaic.masks.op import ATTENTIONS
from mosaic.partition.context import Context, Output
from mosaic.partition.table import RULES
from mosaic.passes.analyze_masks import analyze_masks
from mosaic.passes.choose_method import choose_method
from mosaic.passes.infer_axes import arriving_axes
from mosaic.passes.normalize import mark_gradients
from mosaic.passes.partition import write
from mosaic.passes.propagate import follow, note_places
from mosaic.passes.rewrite_attention import rewrite_attention
from mosaic.runtime import sharded_tensor
from mosaic.runtime.agreement import check_together
from mosaic.runtime.deferred_tensor import DeferredTensor, Step, flattened, run
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, is_traced, part_of, whole, wrapped
from mosaic.runtime.world import world_of
from mosaic.torch_private import FakeTensorMode, fake_mode_of, no_dispatch, pytree, without_modes

log = logging.getLogger(__name__)
aten = torch.ops.aten


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

    def run(self, parts: Sequence[Tensor], wrap: Callable[..., Tensor] = ShardedTensor) -> Any:
        """On this rank's parts; ``wrap(part, shape, places, stride)`` makes a cut result."""
        for why in self.gathered:
            say(why)
        return self.wrapped(self.graph(*parts), wrap)

    def wrapped(self, parts: Sequence[Tensor], wrap: Callable[..., Tensor] = ShardedTensor) -> Any:
        """The op's results, of this rank's parts of its outputs."""
        found = [
            wrap(x, shape, places, stride) if places else x
            for x, (shape, places, stride) in zip(parts, self.outputs, strict=True)
        ]
        return pytree.tree_map(lambda i: None if i is None else found[i], self.results)


MOST_PROGRAMS = 4096
SAID: set[tuple[str, str]] = set()


def say(why: str) -> None:
    """What is gathered, once for each of the user's lines."""
    frame = user_frame()
    line = f"{frame.file}:{frame.line}" if frame else "source line not recorded"
    if (why, line) not in SAID:
        SAID.add((why, line))
        log.warning("mosaic: gathered, correct but slow: %s [%s]", why, line)


def user_frame() -> Frame | None:
    """The user's line that is run."""
    frames = frames_of("".join(traceback.format_stack()))
    return frames[-1] if frames else None


def meet(mesh_axis: str, func: Any) -> None:
    """All ranks must come to an op that makes something whole: ``if rank == 0: print(x.mean())``
    would wait for ever. Raises ShardingError, with the user's line, where one does not."""
    op = str(func).removesuffix(".default")
    try:
        check_together(get_context(), mesh_axis, op)
    except ShardingError as error:
        frame = user_frame()
        raise ShardingError(
            error.title,
            where=None if frame is None else str(frame),
            op=op,
            fix="let every rank do it (x = x.full_tensor() or x.mean() on all, print on one), "
            "or look at x.local",
        ) from error


def run_op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op of ATen of which some tensors are cut."""
    if is_traced(args, kwargs):
        return run_on_shapes(func, args, kwargs)
    if func._schema.is_mutable:
        return run_in_place(func, args, kwargs)
    waits = deferred(func, args, kwargs, is_view(func))
    if waits is not None:
        return waits
    if has_deferred(args, kwargs):
        args, kwargs = pytree.tree_map_only(DeferredTensor, DeferredTensor.made, (args, kwargs))
        return func(*args, **kwargs)
    is_number = not all("Tensor" in str(r.type) for r in func._schema.returns)
    if is_number or not are_cut(args, kwargs):
        return run_whole(func, args, kwargs)
    try:
        program = program_of(func, args, kwargs)
    except DATA_DEPENDENT:
        say(f"{str(func).removesuffix('.default')} gives as many elements as its values say")
        return run_whole(func, args, kwargs)
    if program.waits_for:
        meet(program.waits_for, func)
    tensors = tensors_of(args, kwargs)
    out = program.run([x._local if isinstance(x, ShardedTensor) else x for x in tensors])
    return pytree.tree_map_only(Tensor, as_view, out) if is_view(func) else out


def as_view(x: Tensor) -> ShardedTensor:
    """A view, also one that is whole on every rank: what is written to it would be lost."""
    view = x if isinstance(x, ShardedTensor) else ShardedTensor(x, x.shape, (), x.stride())
    view.is_view = True
    return view


#: Of a cut tensor that Dynamo looks at, these are as it is.
SAME = (aten.detach.default, aten.alias.default, aten.clone.default)


def run_on_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """While Dynamo traces only the sizes count, which are global: the backend cuts what it makes.
    No rule is asked, and nothing is sent."""
    x = args[0]
    if isinstance(x, DeferredTensor) and (func in SAME or is_view(func)):
        return deferred(func, args, kwargs, is_view=True)
    if isinstance(x, ShardedTensor) and func in SAME:
        like = torch.empty_strided(x.shape, x.stride(), device="meta")
        stride = func(like, **kwargs).stride()  # a clone may be contiguous
        return ShardedTensor(func(x._local, **kwargs), x.shape, x.places, stride)
    if isinstance(x, ShardedTensor) and is_view(func):  # Dynamo makes an input by its view
        args, kwargs = pytree.tree_map_only(torch.SymInt, int, (args, kwargs))
        with suppress(RuntimeError), without_modes():  # a view of strides that allow none
            program = program_of(func, args, kwargs)
            return program.wrapped(program.graph(x._local))

    def as_whole(x: Any) -> Any:
        if not isinstance(x, (ShardedTensor, DeferredTensor)):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    with mode_of(args, kwargs):
        args, kwargs = pytree.tree_map(as_whole, (args, kwargs))
        return func(*args, **kwargs)


def mode_of(*arguments: Any) -> FakeTensorMode:
    """That of Dynamo, of tensors that it looks at."""
    flat = flattened(pytree.tree_leaves(arguments))
    found = fake_mode_of(flat, [x._local for x in flat if isinstance(x, ShardedTensor)])
    assert found is not None
    return found


def has_deferred(*arguments: Any) -> bool:
    return any(isinstance(x, DeferredTensor) for x in pytree.tree_leaves(arguments))


def is_view(func: Any) -> bool:
    """Whether an op gives another look at its operand's memory, of which a rank may have copied its
    part."""
    if func in (aten.detach.default, aten.alias.default) or func._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in func._schema.returns)


def are_cut(*arguments: Any) -> bool:
    """Whether any tensor among them is cut."""
    return any(getattr(x, "places", ()) for x in pytree.tree_leaves(arguments))


def run_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op that needs all of its tensors, on every rank."""
    cut = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, ShardedTensor)]
    meshes = {place.mesh_axis: None for x in cut for place in x.places}
    if meshes:
        meet(",".join(meshes), func)
    args, kwargs = pytree.tree_map_only(Tensor, whole, (args, kwargs))
    return func(*args, **kwargs)


def run_attention(*args: Any, **kwargs: Any) -> Any:
    """``F.scaled_dot_product_attention``: cut by the quickest exact method, as in a compiled graph.
    Its op has a backward of its own, on this rank's parts."""
    func = aten.scaled_dot_product_attention.default
    mask = kwargs.get("attn_mask") if len(args) < 4 else args[3]
    if mask is not None and mask.ndim < 2:
        args, kwargs = (*args[:3], mask.unsqueeze(0), *args[4:]), {**kwargs}
        kwargs.pop("attn_mask", None)
    if not are_cut(args, kwargs):  # written to until nothing was cut
        args, kwargs = pytree.tree_map_only(DeferredTensor, DeferredTensor.made, (args, kwargs))
        args, kwargs = pytree.tree_map_only(ShardedTensor, lambda x: x.local, (args, kwargs))
        return func(*args, **kwargs)
    program = program_of(func, args, kwargs)
    tensors = tensors_of(args, kwargs)
    return program.run([x.local if isinstance(x, ShardedTensor) else x for x in tensors], wrapped)


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
        programs[key] = planned(func, args, kwargs)
    return programs[key]


def described(x: Any) -> Any:
    if isinstance(x, DeferredTensor):
        return (x.steps, *map(described, x.current()))
    if not isinstance(x, Tensor):
        return (type(x), x)
    places = x.places if isinstance(x, ShardedTensor) else ()
    shape, stride = (tuple(map(int, sizes)) for sizes in (x.shape, x.stride()))
    return Described(shape, stride, x.dtype, x.device, places, learns(x))


def learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def run_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.add_(y)`` is ``x + y``, written into what this rank holds of x."""
    target = args[0]
    is_look = torch.Tag.inplace_view in func.tags
    ours = isinstance(target, (ShardedTensor, DeferredTensor))
    if ours and target.is_view and not is_look:
        raise UnsupportedError(
            f"{func} writes into a view of a tensor that is cut",
            sizes=list(target.shape),
            fix="make a new tensor instead (torch.where, index_put, cat), or write before the view",
        )
    new = without_writing(func)(*args, **kwargs)
    if isinstance(target, DeferredTensor):
        target.set(*((new.steps, new.leaves) if isinstance(new, DeferredTensor) else ((), (new,))))
    elif is_look:  # x.unsqueeze_(0): other sizes, nothing is written
        with no_dispatch():
            func(*args, **kwargs)
        is_cut = isinstance(new, ShardedTensor)
        target._local, target.places = (new._local, new.places) if is_cut else (new, ())
    elif isinstance(target, ShardedTensor):
        target._local.copy_(part_of(new, target.places))
    else:
        target.copy_(whole(new))
    return target


def without_writing(func: Any) -> Any:
    """``add.Tensor`` of ``add_.Tensor``: the op of the same arguments that gives a new tensor."""
    name = func._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in packet.overloads() if packet else ():
        found = getattr(packet, overload)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    raise UnsupportedError(
        f"{func} writes into a tensor that is cut, in a form that Mosaic does not know",
        fix="use the form without out=, or x.full_tensor()",
    )


# --- one op as a program ------------------------------------------------------------------------


def planned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Write this rank's program of ``func(*args, **kwargs)``."""
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
        return written(graph, [node], cut, 0)
    there = [i for i, x in enumerate(val) if isinstance(x, Tensor)]
    items = [insert(graph, node, operator.getitem, (node, i)) for i in there]
    numbers = (there.index(i) if i in there else None for i in range(len(val)))
    return written(graph, items, cut, type(val)(numbers))


def written(
    graph: fx.Graph, nodes: list[fx.Node], cut: dict[int, tuple[Place, ...]], results: Any
) -> Program:
    vals = [node.meta["val"] for node in nodes]
    shapes, strides = [val.shape for val in vals], [val.stride() for val in vals]
    graph.output(tuple(nodes))
    mark_gradients(graph)
    context = context_of(graph, cut)
    if any(node.target in ATTENTIONS for node in graph.nodes):
        analyze_masks(graph, context)
        note_places(follow(graph, context), context)
        choose_method(graph, context)
    for number, axis in enumerate(context.axes):
        write(graph, context, axis, number)
    rewrite_attention(graph, context)
    places = [tuple(Shard.decode(text).place for text in texts) for texts in context.output_shards]
    return Program(
        fx.GraphModule(torch.nn.Module(), graph),
        tuple(zip(shapes, places, strides, strict=True)),
        results,
        tuple(why for why, _ in context.gathered),
        waits_for(graph, context, places),
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


sharded_tensor.RUN.update(op=run_op, attention=run_attention, meet=meet)
