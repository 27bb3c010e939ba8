"""What Mosaic would do with a model, without ranks: the happy twin of an error message."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend import backend, calls
from mosaic.frontend.flash import allow_package
from mosaic.frontend.recurrences import allow_functions
from mosaic.frontend.sharded_inputs import Output, outputs_of
from mosaic.graph import pipeline
from mosaic.partition.context import Context
from mosaic.report.plan import LISTENERS, Plan
from mosaic.report.show import listing
from mosaic.runtime import mesh
from mosaic.runtime.sharded_tensor import wrapped
from mosaic.torch_private import FakeStore, code_at_hand, without_flex_warnings, without_traces


def explain(
    fn: Callable[..., Any],
    *args: Any,
    spec: ShardingSpec | None = None,
    sp_size: int | None = None,
    mesh_shape: Sequence[int] | None = None,
    mesh_axes: Sequence[str] | None = None,
    rank: int = 0,
    **kwargs: Any,
) -> Plan:
    """The plan for ``fn(*args, **kwargs)`` on ``sp_size`` ranks; nothing is computed or sent.

    ``mesh_shape=(2, 3), mesh_axes=("r", "c")`` for ranks with several mesh axes.

    Needs no ranks: without a process group a fake one is made for the time of the call. The plan
    has every attention with its source line, axis, method, mask and bytes; every other collective
    with its reason; every pass with its rewrites, time and what it changed (``plan.diffs``); and
    the graphs themselves (``plan.graphs``).

    Raises what compiling would raise: MosaicError and its subclasses.
    """
    found: list[Plan] = []
    options: dict[str, Any] = {"inner": "eager"} | ({} if spec is None else {"spec": spec})
    backend.Options(**options)  # says what is wrong with them, before Dynamo wraps it
    if not callable(fn):
        raise ShardingError(
            f"cannot explain {fn!r}: it is no function",
            fix="pass the model, then its arguments: mosaic.explain(model, x, sp_size=4)",
        )
    wanted = Ranks(sp_size, mesh_shape, mesh_axes)
    with (
        ranks(wanted, rank),
        listening(found),
        calls.planned(options),
        without_traces() as compiled,
        without_collection(),
        without_flex_warnings(),
    ):
        plan = planning(compiled, found)
        allow_package()
        allow_functions()
        torch.compile(fn, backend=plan, options=options, dynamic=False)(*args, **kwargs)
    return merged(found)


def merged(found: list[Plan]) -> Plan:
    """The plan with the most attentions speaks for the program; the others are notes to it."""
    if not found:
        raise ShardingError(
            "nothing was compiled: the program has no tensor operation that torch.compile sees",
            fix="pass a model and tensors for it; it must not be under torch.compiler.disable",
        )
    best = max(found, key=lambda p: len(p.attentions))
    if len(found) > 1:
        best.others = [plan for plan in found if plan is not best]
        best.notes.append(
            f"{len(found)} graphs: the program breaks; what is cut stays cut in between"
        )
    return best


def planning(compiled: list[CodeType], found: list[Plan]) -> Callable[..., Callable[..., Any]]:
    """A backend that compiles as ``mosaic`` does, and gives zeros for results: no kernel and no
    collective runs. A new one each time: Dynamo never takes what was compiled with another one.
    ``compiled`` grows by what it was given, ``found`` by the plans."""

    def plan(module: Any, example_inputs: Any, *, options: dict[str, Any]) -> Callable[..., Any]:
        compiled.append(code_at_hand())
        backend.mosaic(module, example_inputs, options=options)
        nodes = module.graph.output_node().args[0]
        values = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in nodes]
        outputs = outputs_of(module, found[-1])

        def run(*args: Any) -> Any:
            return [_zeros(x, out, args) for x, out in zip(values, outputs, strict=True)]

        return run

    return plan


@contextmanager
def without_collection() -> Iterator[None]:
    """Do not look for garbage: planning makes millions of objects that stay, and looking through
    them again and again takes an eighth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _zeros(value: Any, output: Output, args: Sequence[Any]) -> Any:
    """Zeros for a graph's output; cut where it stays cut, and deferred where it is."""
    if not isinstance(value, torch.Tensor):
        return value
    recipe = output.recipe
    if recipe is not None:
        leaves = zip(recipe.leaves, output.leaves, strict=True)
        return recipe.of(
            [
                args[out] if isinstance(out, int) else _cut_zeros(x.dtype, value.device, out)
                for x, out in leaves
            ]
        )
    return _cut_zeros(value.dtype, value.device, output, value.requires_grad)


def _cut_zeros(
    dtype: torch.dtype, device: torch.device, output: Output, requires_grad: bool = False
) -> torch.Tensor:
    shape, places = list(output.shape), output.places
    part = shape
    for place in places:
        part = place.local_shape(part, mesh.get_context().rank(place.mesh_axis))
    out = torch.zeros(part, dtype=dtype, device=device, requires_grad=requires_grad)
    return wrapped(out, shape, places, output.stride) if places else out


@contextmanager
def listening(found: list[Plan]) -> Iterator[None]:
    """Collect the plans that are made meanwhile, each with the listings around its passes."""
    last: dict[str, str] = {}
    steps: dict[str, tuple[str, str]] = {}

    def observe(after: str, kind: str, graph: fx.Graph, context: Context) -> None:
        text = listing(graph, context, brief=kind != "global")
        if after:
            steps[f"{after} backward" if kind == "backward" else after] = (last[kind], text)
        last[kind] = text

    def listen(plan: Plan) -> None:
        plan.steps.update(steps)
        steps.clear()
        found.append(plan)

    LISTENERS.append(listen)
    pipeline.OBSERVERS.append(observe)
    try:
        yield
    finally:
        pipeline.OBSERVERS.remove(observe)
        LISTENERS.remove(listen)


@dataclass(frozen=True)
class Ranks:
    """The ranks to plan for; nothing said: those of ``mosaic.init``."""

    sp_size: int | None = None
    mesh_shape: Sequence[int] | None = None
    mesh_axes: Sequence[str] | None = None

    @property
    def world(self) -> int:
        return prod(self.mesh_shape) if self.mesh_shape else self.sp_size or 1


@contextmanager
def ranks(wanted: Ranks, rank: int) -> Iterator[None]:
    """The ranks of ``mosaic.init`` if there are any; else a fake world for the time of the call."""
    mesh.check_sizes(wanted.sp_size, wanted.mesh_shape, wanted.mesh_axes)
    if dist.is_initialized() or mesh.current_context() is not None:
        check_same(wanted, mesh.get_context())  # says what to do if there is no context yet
        yield
        return
    if rank not in range(wanted.world):
        raise ShardingError(
            f"there is no rank {rank!r} among {wanted.world}", fix="count them from 0"
        )
    size = wanted.sp_size if wanted.mesh_shape else wanted.world
    hook = sys.excepthook  # a group puts "[rank0]:" before all that the process says when it dies
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=wanted.world)
    try:
        with mesh.pretended(size, wanted.mesh_shape, wanted.mesh_axes):
            yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def check_same(wanted: Ranks, context: mesh.MosaicContext) -> None:
    """Raise ShardingError where other ranks are asked for than there are."""
    there = dict(zip(context.axes, map(context.size, context.axes), strict=True))
    if wanted.mesh_shape and wanted.mesh_axes:
        asked = dict(zip(wanted.mesh_axes, wanted.mesh_shape, strict=False))
    else:
        asked = {} if wanted.sp_size is None else {"sp": wanted.sp_size}
    if any(there.get(axis) != size for axis, size in asked.items()):
        raise ShardingError(
            "a plan for other ranks than those of mosaic.init",
            asked=_sizes(asked),
            there=_sizes(there),
            fix="leave the sizes out, or call mosaic.get_context().shutdown() first",
        )


def _sizes(axes: dict[str, int]) -> str:
    return ", ".join(f"{axis} = {size}" for axis, size in axes.items())
