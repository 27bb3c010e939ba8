"""The Dynamo backend ``mosaic``: capture, PIPELINE, AOTAutograd with JOINT and LOWERING, and an
inner compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from mosaic.api.errors import MosaicError, ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend import calls, decoding, dtensors, shard_programs
from mosaic.frontend.capture import Captured, capture
from mosaic.frontend.data_check import DataCheck
from mosaic.frontend.digest import conditions, plan_digest, text_of
from mosaic.frontend.lengths import Padding, captured_at_bucket, padding_of, unit_sizes
from mosaic.frontend.refused import refuse_unknown
from mosaic.frontend.sharded_inputs import (
    Arriving,
    Output,
    arriving_shards,
    check_ranks,
    made,
    mesh_axes,
    outputs_of,
    part_examples,
    parts_of,
    write_back,
)
from mosaic.frontend.texts import Texts, texts_of
from mosaic.frontend.unit_lengths import at_their_length
from mosaic.frontend.user_warnings import announce, once, resumed_at
from mosaic.graph.lengths import Length, NotPaddedError
from mosaic.graph.modes import Modes
from mosaic.graph.pipeline import run_passes, without_those_off
from mosaic.graph.real_strides import heeding_strides
from mosaic.graph.regions import repeats_once
from mosaic.graph.sequence import sequence
from mosaic.graph.unexpected import ours
from mosaic.partition.context import Context
from mosaic.passes import JOINT, LOWERING, OPTIONAL, PIPELINE
from mosaic.report.debug import debugging
from mosaic.report.memory import parameters_of
from mosaic.report.plan import LISTENERS, Plan, plan_of
from mosaic.runtime import agreement
from mosaic.runtime.autograd_functions import AUTOGRAD_FUNCTIONS
from mosaic.runtime.deferred_tensor import flattened
from mosaic.runtime.mesh import MosaicContext, context_or_world_of_one
from mosaic.runtime.rendezvous import report_failure
from mosaic.runtime.world import own_axes, world_of
from mosaic.torch_private import (
    Restart,
    bake_floats,
    compile_by_eager,
    compile_by_inductor,
    watch_all,
)

WHOLE = ShardingSpec()
INNER: dict[str, Callable[..., Callable[..., Any]]] = {
    "inductor": partial(compile_by_inductor, shorten=repeats_once),
    "eager": partial(compile_by_eager, guard=heeding_strides),
}


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may hold."""

    spec: ShardingSpec = field(default_factory=ShardingSpec)
    inner: str = "inductor"
    owner: calls.Owner | None = None  # of a model of which this is a unit: parallelize.py
    is_first_graph: bool = True  # of this torch.compile

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ShardingError(
                f"there is no inner compiler {self.inner!r}", fix="use 'inductor' or 'eager'"
            )
        if not isinstance(self.spec, ShardingSpec):
            raise ShardingError(
                f"spec is a {type(self.spec).__name__}", fix="pass a mosaic.ShardingSpec"
            )


def mosaic(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one Dynamo graph for the ranks of ``mosaic.init``.

    Raises MosaicError and its subclasses, and nothing else (``graph/unexpected.py``); Dynamo wraps
    them in BackendCompilerFailed, whose text ends with ours. Some of torch's own errors it would
    take for a graph break, and run eagerly.
    """
    bake_floats(module)
    try:
        with AUTOGRAD_FUNCTIONS.kept(), debugging():
            return compile_graph(module, example_inputs, options)
    except (MosaicError, Restart):
        raise
    except Exception as error:
        raise ours(error) from error


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None
) -> Callable[..., Any]:
    """The passes before and after AOTAutograd; the ranks compare what each has made."""
    unknown = set(options or {}) - {"spec", "inner", "owner"}
    if unknown:
        raise ShardingError(
            f"unknown options: {', '.join(sorted(unknown))}", fix="options are 'spec' and 'inner'"
        )
    chosen = Options(**(options or {}), is_first_graph=calls.counted() == 1)
    ranks, arriving = context_or_world_of_one(), arriving_shards(module)
    check_ranks(arriving, ranks)
    parallel = dtensors.axis_of(module, ranks)
    group = ranks.group(joint_mesh(chosen.spec, arriving, parallel)) if ranks else None
    if not arriving and not parallel and decoding.is_step(module, chosen.spec):
        return run_whole(module, example_inputs, chosen, ranks, group)
    try:
        local, context, plan, padding = partitioned(module, chosen, ranks, arriving, parallel)
    except Exception as error:
        report_failure(group, error)
        raise
    facts = plan_digest(context, plan, conditions(module))
    agreement.agree(group, facts)
    context.constants = len([*local.parameters(), *local.buffers()])
    lowering = Lowering(context, plan)
    try:
        given = padding.examples(example_inputs) if isinstance(padding, Texts) else example_inputs
        examples = part_examples(module, given, context.mutated, context.arriving)
        if isinstance(padding, Padding):
            examples = padding.examples(module, examples)
        compiled = INNER[chosen.inner](local, examples, lowering)
    except Restart:  # AOTAutograd wants a number as a constant: Dynamo traces anew, on every rank
        raise
    except Exception as error:
        report_failure(group, error, agreement.FINISH)
        raise
    agreement.agree_on_collectives(group, lowering.sequences)
    for listener in LISTENERS:
        listener(plan)
    check = data_check(context, ranks, facts, any(lowering.sequences.values()))
    if isinstance(padding, Padding):
        return padded(compiled, context, padding, check)
    return checked(compiled, context, outputs_of(module, plan), check, padding)


def run_whole(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    ranks: MosaicContext | None,
    group: dist.ProcessGroup | None,
) -> Callable[..., Any]:
    """A step of decoding as it is, with sizes that may change: nothing is cut, nor sent."""
    facts = agreement.digest(
        graph=text_of(module.graph),
        spec=options.spec.encode(),
        plan="decoding",
        modes=conditions(module),
        versions=torch.__version__,
    )
    agreement.agree(group, facts)
    compiled = INNER[options.inner](module, example_inputs, lambda graph, kind: None)
    plan = decoding.planned(ranks.size(options.spec.mesh) if ranks else 1)
    for listener in LISTENERS:
        listener(plan)

    def run(*args: Any) -> Any:
        calls.running(WHOLE)
        return compiled(*args)

    return run


watch_all(mosaic, calls.watch)


def partitioned(
    module: fx.GraphModule,
    options: Options,
    ranks: MosaicContext | None,
    arriving: Arriving,
    parallel: str | None,
) -> tuple[fx.GraphModule, Context, Plan, Padding | Texts | None]:
    """PIPELINE: from Dynamo's graph to this rank's local program; with buckets one for all lengths
    of a bucket, if there is an exact form of that, else one for any number of packed texts."""
    spec, owner, goes_on = options.spec, options.owner, calls.goes_on(module)
    is_unit = owner is not None and owner.has_units
    if owner and owner.shares and not goes_on:
        spec = replace(spec, gradients="shares")
    world = world_of(ranks, joint_mesh(spec, arriving, parallel))
    if spec.gives_shares and world.size > 1:
        calls.check_one_graph(module, spec)
    first = shard_programs.first_call(module)
    if first is not None and not arriving:
        return *shard_programs.passed_through(module, first, spec, world), None
    refuse_unknown(module)
    dtensors.refuse(module, ranks, parallel, own_axes(joint_mesh(spec, arriving, None)))
    worlds = [world_of(ranks, mesh) for mesh in meshes(spec, arriving)]

    # One process alone has plain tensors.
    stays_cut = ranks is not None and (goes_on or bool(arriving) or spec.outputs != "whole")

    def context_of(captured: Captured, length: Length | None = None) -> Context:
        context = Context(
            spec, world, captured.inputs, captured.mutated, Modes.current(), arriving=arriving,
            policies=captured.policies, worlds=worlds, checks=captured.checks, length=length,
        )  # fmt: skip
        if parallel:
            context.parallel, context.dtensors = world_of(ranks, parallel), dtensors.cut(module)
            context.worlds = [*worlds, context.parallel, world_of(ranks, spec.mesh)]
        context.goes_on = goes_on
        context.stays_cut = stays_cut
        context.has_other_names = is_unit or resumed_at(captured.graph) is not None
        context.is_first_graph = options.is_first_graph
        context.graph_text = text_of(captured.graph)
        return context

    sizes = unit_sizes(module, owner.length) if owner is not None and is_unit else None
    if spec.buckets is not None and (arriving or sizes or not is_unit):
        reasons = {
            "the graph breaks": goes_on,
            "inputs are cut already": bool(arriving) and not is_unit,
            "parameters are DTensors": bool(parallel),
        }
        why_not = next((why for why, is_so in reasons.items() if is_so), "")
        try:
            padding = padding_of(module, spec, why_not, sizes)
            return at_bucket(module, padding, context_of, owner)
        except NotPaddedError as error:
            once(error.said())
    arriving = at_their_length(module, arriving)
    texts = texts_of(module)
    captured = capture(module, texts.size if texts else int)
    if texts:
        texts.guard()
    return *through_passes(captured, context_of(captured), owner), texts


def at_bucket(
    module: fx.GraphModule,
    padding: Padding,
    context_of: Callable[[Captured, Length], Context],
    owner: calls.Owner | None,
) -> tuple[fx.GraphModule, Context, Plan, Padding]:
    """The program for all lengths of a bucket."""
    captured, length = captured_at_bucket(module, padding)
    local, context, plan = through_passes(captured, context_of(captured, length), owner)
    padding = padding.with_outputs(module, plan, context.output_rows)
    padding.guard(length.least)
    return local, context, plan, padding


def through_passes(
    captured: Captured, context: Context, owner: calls.Owner | None
) -> tuple[fx.GraphModule, Context, Plan]:
    """This rank's local program of a global one, and its plan."""
    passes = without_those_off(PIPELINE, OPTIONAL)
    reports = run_passes(passes, captured.graph, context, "global")
    if owner:
        owner.planned(context.axes)
    plan = plan_of(context, reports)
    announce(plan, is_part=context.goes_on or owner is not None)
    plan.graphs["local"] = captured.graph
    plan.parameters = parameters_of(captured.graph, context.inputs)
    local = fx.GraphModule(captured.root, captured.graph)
    return local, context, plan


def meshes(spec: ShardingSpec, arriving: Arriving) -> list[str]:
    """The mesh axes that are cut, and every few of them as one: an attention may run over some
    axes, flattened. All ranks make their groups here, before programs could differ."""
    cut = list(dict.fromkeys([*(m.mesh for m in spec.sharded.values()), *mesh_axes(arriving)]))
    some = chain.from_iterable(combinations(cut, n) for n in range(1, max(2, len(cut))))
    return [",".join(few) for few in some]


def joint_mesh(spec: ShardingSpec, arriving: Arriving, parallel: str | None) -> str:
    """Every mesh axis that takes part, as one long one; replicas (dp) have data of their own."""
    named = own_axes(spec.mesh) if spec.sharded or not arriving else set()
    named |= {parallel} - {"dp"} if parallel else set()
    return ",".join(sorted(named.union(*map(own_axes, mesh_axes(arriving)))))


@dataclass
class Lowering:
    """Our passes on the graphs that AOTAutograd makes: joint, then forward and backward. Notes
    which collectives forward and backward then start."""

    context: Context
    plan: Plan
    sequences: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def __call__(self, graph: fx.Graph, kind: str) -> None:
        if kind == "joint":
            self.plan.passes += run_passes(JOINT, graph, self.context, kind)
            return
        passes = without_those_off(LOWERING, OPTIONAL)
        self.plan.passes += run_passes(passes, graph, self.context, kind)
        self.plan.graphs[kind] = graph
        worlds = (self.context.world, *self.context.worlds)
        self.sequences[kind] = sequence(graph, {w.group: w.mesh_axis for w in worlds})


def data_check(
    context: Context, ranks: MosaicContext | None, facts: str, sends: bool
) -> DataCheck | None:
    """What compares this graph's whole inputs across ranks, if anything does. A graph without
    collectives is looked at once: nothing waits for it on other ranks."""
    spec, mesh = context.spec, own_axes(context.world.mesh_axis)
    if context.parallel and context.has_other_names:  # a unit's inputs may be one rank's of tp
        mesh -= {context.parallel.mesh_axis}
    group = ranks.group(",".join(sorted(mesh))) if ranks and mesh else None
    if ranks is None or group is None or context.world.size == 1 or not spec.check_inputs:
        return None
    if dist.get_backend(group) == "fake":
        return None
    given = context.inputs[:-1] if context.length else context.inputs
    cut = {*context.arriving, *context.dtensors}
    whole = [i for i in given if i.index not in cut]
    arguments = [i for i in whole if not i.is_state and not context.holds_shards]
    state = [i for i in whole if i.is_state]
    every_run = spec.check_inputs == "always" and sends
    return DataCheck(ranks, group, facts, arguments, state, every_run)


def checked(
    compiled: Callable[..., Any],
    context: Context,
    outputs: Sequence[Output],
    check: DataCheck | None,
    texts: Texts | None,
) -> Callable[..., Any]:
    """Compare inputs before a run; this rank's parts go in, and what stays cut comes out as
    ShardedTensors."""
    spec = context.spec if context.world.size > 1 else WHOLE

    def run(*args: Any) -> Any:
        calls.running(spec)
        given = flattened(texts.padded(args) if texts else args)
        if check is not None:
            check(given)
        for one in context.checks:
            one(given)
        mine = parts_of(given, context.mutated)
        found = iter(compiled(*mine))
        if check is not None:
            check.settle()
        write_back(given, mine, context.mutated)
        return [made(out, args, found) for out in outputs]

    return run


def padded(
    compiled: Callable[..., Any], context: Context, padding: Padding, check: DataCheck | None
) -> Callable[..., Any]:
    """Compare inputs before a run, as they are given; they go in padded, and outputs come out
    without their padding."""

    def run(*args: Any) -> Any:
        calls.running(context.spec if context.world.size > 1 else WHOLE)
        given = flattened(args)
        if check is not None:
            check(given)
        n = padding.length_of(args)
        found = compiled(*padding.padded(given, n))
        if check is not None:
            check.settle()
        return padding.cut(found, n)

    return run
