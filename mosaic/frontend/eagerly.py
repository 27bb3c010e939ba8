"""Ops on ShardedTensors without torch.compile: each is a program of one op, cut by the same rules.

    y = x @ w        # x f64[2, 13/sp, 8], w whole
    ->   a graph of one ``mm`` at global sizes, written for this rank by ``partition``; kept, and
         run whenever the same op comes with the same sizes and places

Autograd works above this, on global tensors: its formulas are ops as well. So gradients are those
of one device without a word about them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError, UnsupportedError
from mosaic.frontend.deferred import SAME_MEMORY, deferred
from mosaic.frontend.op_program import learns, program_of, tensors_of
from mosaic.frontend.user_warnings import gathered_at, user_frame
from mosaic.graph.unexpected import DATA_DEPENDENT
from mosaic.masks.op import PLAIN, STRUCTURED
from mosaic.runtime import sharded_tensor
from mosaic.runtime.agreement import check_together
from mosaic.runtime.deferred_tensor import DeferredTensor, flattened, of_any_strides
from mosaic.runtime.many_lengths import is_open
from mosaic.runtime.memory import UNDO, Memory, views_of
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import ShardedTensor, is_traced, part_of, whole
from mosaic.torch_private import (
    FakeTensorMode,
    FunctionalTensor,
    fake_mode_of,
    flex_op,
    flex_op_of_subclasses,
    is_composite,
    no_dispatch,
    pytree,
    without_modes,
)

aten = torch.ops.aten


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
    refuse_other_compilers(args, kwargs)
    if func._schema.is_mutable:
        return run_in_place(func, args, kwargs)
    if func in SAME_MEMORY and isinstance(args[0], ShardedTensor):
        return args[0].bare()
    waits = deferred(func, args, kwargs, is_view(func) or func in SAME_MEMORY)
    if waits is not None:
        return waits
    if has_deferred(args, kwargs):
        args, kwargs = pytree.tree_map_only(DeferredTensor, DeferredTensor.made, (args, kwargs))
        return of_any_strides(func)(*args, **kwargs)
    if is_composite(func):  # in inference mode torch does not take it apart
        return func.decompose(*args, **kwargs)
    is_number = not all("Tensor" in str(r.type) for r in func._schema.returns)
    if is_number:
        return run_whole(func, args, kwargs)
    if func == aten.index.Tensor:
        args = (args[0], by_positions(args[1]))
    if not are_cut(args, kwargs):
        out = run_whole(func, args, kwargs)
        return viewed(out, func, args, kwargs) if is_view(func) else out
    try:
        program = program_of(func, args, kwargs)
    except DATA_DEPENDENT:
        name = str(func).removesuffix(".default")
        gathered_at(f"{name} gives as many elements as its values say")
        return run_whole(func, args, kwargs)
    if program.waits_for:
        meet(program.waits_for, func)
    tensors = tensors_of(args, kwargs)
    out = program.run([x._local if isinstance(x, ShardedTensor) else x for x in tensors])
    return viewed(out, func, args, kwargs) if is_view(func) else out


def refuse_other_compilers(*arguments: Any) -> None:
    """They look at the ops that work on parts, and know nothing of ranks. Raises UnsupportedError
    where AOTAutograd calls."""
    parts = (x._local for x in pytree.tree_leaves(arguments) if isinstance(x, ShardedTensor))
    if any(isinstance(x, FunctionalTensor) for x in parts):
        raise UnsupportedError(
            "a tensor that is cut was given to torch.compile with another backend than Mosaic's",
            fix='compile with backend="mosaic" (options={"inner": "inductor"} is its default), or '
            "do not compile this part",
        )


def viewed(out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The views that ``func`` gives, also those that are whole on every rank."""
    found = out if isinstance(out, (tuple, list)) else [out]
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    base = given.pop(names[0])
    base.memory.is_viewed = True
    known = views_of(base.bare(), func, given, len(found))
    writes = base.memory.root.writes
    views = []
    for x, view in zip(found, known, strict=True):
        part, places = (x._local, x.places) if isinstance(x, ShardedTensor) else (x, ())
        part = part.resolve_conj().resolve_neg()  # ops on parts do not look at such marks
        memory = Memory(part, view, seen=writes)
        views.append(base.viewed(memory, x.shape, places, x.stride()))
    return type(out)(views) if isinstance(out, (tuple, list)) else views[0]


def by_positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices whose count is known: ``x[mask]`` with a whole mask is ``x[mask.nonzero()]``."""
    found: list[Tensor | None] = []
    for i in indices:
        if i is None or i.dtype not in (torch.bool, torch.uint8) or are_cut(i):
            found.append(i)
        else:
            found += whole(i).nonzero(as_tuple=True)
    return found


#: Of a cut tensor that Dynamo looks at, these are as it is.
SAME = (*SAME_MEMORY, aten.clone.default)


def run_on_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """While Dynamo traces only the sizes count, which are global: the backend cuts what it makes.
    No rule is asked, and nothing is sent."""
    x = args[0]
    if is_open(x) and func in SAME:
        names, known = x.__tensor_flatten__()
        inner = {name: getattr(x, name) for name in names}
        return type(x).__tensor_unflatten__(inner, known, x.shape, x.stride())
    if isinstance(x, DeferredTensor) and not is_open(x) and (func in SAME or is_view(func)):
        args, kwargs = pytree.tree_map_only(torch.SymInt, int, (args, kwargs))  # of another length
        return deferred(func, args, kwargs, is_view=True)
    if isinstance(x, ShardedTensor) and func in SAME:
        like = torch.empty_strided(x.shape, x.stride(), device="meta")
        stride = func(like, **kwargs).stride()  # a clone may be contiguous
        return ShardedTensor(func(x._local, **kwargs), x.shape, x.places, stride)
    if isinstance(x, ShardedTensor) and not is_open(x) and is_view(func):
        # Dynamo makes an input by its view
        args, kwargs = pytree.tree_map_only(torch.SymInt, int, (args, kwargs))
        with suppress(RuntimeError), without_modes():  # a view of strides that allow none
            program = program_of(func, args, kwargs)
            return program.wrapped(program.graph(x._local))

    with mode_of(args, kwargs):
        args, kwargs = pytree.tree_map(as_whole, (args, kwargs))
        return func(*args, **kwargs)


def as_whole(x: Any) -> Any:
    """Of a tensor that is cut one of the same sizes, in the mode at hand."""
    if not isinstance(x, (ShardedTensor, DeferredTensor)):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def run_flex(*args: Any) -> Any:
    """``flex_attention``, on sizes alone: without a compiler its mask and scores are functions of
    single pairs, which no op tells us about."""
    if is_traced(args):
        return run_on_shapes(flex_op, args, {})
    frame = user_frame()
    raise UnsupportedError(
        "flex_attention of a tensor that is cut, outside of a compiled function",
        where=None if frame is None else str(frame),
        fix='call it in a function that is compiled with backend="mosaic", or on x.full_tensor()',
    )


flex_op_of_subclasses({ShardedTensor: run_flex, DeferredTensor: run_flex}, as_whole)


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
    if func in SAME_MEMORY or func._schema.is_mutable:
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


def run_attention(*args: Any, op: Any = PLAIN, **kwargs: Any) -> Any:
    """``F.scaled_dot_product_attention``, or ours: cut by the quickest exact method, as in a
    compiled graph. Its op has a backward of its own, on this rank's parts."""
    refuse_other_compilers(args, kwargs)
    mask = kwargs.get("attn_mask") if len(args) < 4 else args[3]
    if mask is not None and mask.ndim < 2:
        args, kwargs = (*args[:3], mask.unsqueeze(0), *args[4:]), {**kwargs}
        kwargs.pop("attn_mask", None)
    if not are_cut(args, kwargs):  # written to until nothing was cut
        args, kwargs = pytree.tree_map_only(DeferredTensor, DeferredTensor.made, (args, kwargs))
        args, kwargs = pytree.tree_map_only(ShardedTensor, lambda x: x.local, (args, kwargs))
        return op(*args, **kwargs)
    return program_of(op, args, kwargs).with_history(args, kwargs)


def run_structured(*args: Any, **kwargs: Any) -> Any:
    """``mosaic.sdpa``, which names a method and a mask in words."""
    if is_traced(args, kwargs):
        return STRUCTURED(*args, **kwargs)
    return run_attention(*args, op=STRUCTURED, **kwargs)


def run_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.add_(y)`` is ``x + y``, written into what this rank holds of x."""
    target = args[0]
    is_look = torch.Tag.inplace_view in func.tags
    if isinstance(target, DeferredTensor) and target.has_others and not is_look:
        raise lost(func, target)
    if is_look and isinstance(target, ShardedTensor) and target.memory.is_viewed and learns(target):
        raise lost(func, target)  # autograd makes views again, by their ops, of other sizes now
    new = without_writing(func)(*args, **kwargs)
    if isinstance(target, DeferredTensor):
        target.set(*((new.steps, new.leaves) if isinstance(new, DeferredTensor) else ((), (new,))))
    elif is_look and isinstance(target, ShardedTensor):  # x.unsqueeze_(0): nothing is written
        with no_dispatch():
            func(*args, **kwargs)
        target.memory, target.places = new.memory, new.places
    elif isinstance(target, ShardedTensor):
        write(func, target, new)
    else:
        target.copy_(whole(new))
    return target


def write(func: Any, x: ShardedTensor, new: Tensor) -> None:
    """Write ``new`` into x and what x is a view of. Raises UnsupportedError where others share its
    memory, and it is not known how."""
    memory = x.memory
    view = memory.view
    if memory.is_shared or (view is not None and view.op not in UNDO):
        raise lost(func, x)
    if view is not None:
        write(func, view.base, UNDO[view.op](view.base, new, **view.given))
    else:
        memory.part.copy_(part_of(new, x.places))
        memory.writes += 1


def lost(func: Any, x: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"{func} writes into a tensor that is cut, and shares memory in a way that is not followed",
        sizes=list(x.shape),
        fix="make a new tensor instead (torch.where, index_put, cat), or write before the view",
    )


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


sharded_tensor.RUN.update(op=run_op, attention=run_attention, structured=run_structured, meet=meet)
