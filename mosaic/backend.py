"""The Dynamo backend ``mosaic``: capture, PIPELINE, AOTAutograd with JOINT and LOWERING, and an
inner compiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from mosaic import agreement, shards
from mosaic.arriving import arriving_shards, global_sizes
from mosaic.capture import capture, read_inputs
from mosaic.context import Context, world_of
from mosaic.errors import ShardingError
from mosaic.mesh import MosaicContext, context_or_world_of_one
from mosaic.modes import Modes
from mosaic.notices import announce, resumed_at
from mosaic.passes import JOINT, LOWERING, PIPELINE
from mosaic.pipeline import run_passes
from mosaic.plan import Plan, plan_of
from mosaic.sequence import sequence
from mosaic.spec import ShardingSpec
from mosaic.tensors import mark
from mosaic.torch_private import compile_by_eager, compile_by_inductor

INNER = {"inductor": compile_by_inductor, "eager": compile_by_eager}

#: Called with every plan that is made; ``explain`` listens here.
LISTENERS: list[Callable[[Plan], None]] = []

#: The options of every torch.compile that has come here; kept alive, so that no id comes twice.
_seen: dict[int, dict[str, Any] | None] = {}


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may hold."""

    spec: ShardingSpec = field(default_factory=ShardingSpec)
    inner: str = "inductor"
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

    Raises MosaicError and its subclasses; Dynamo wraps them in BackendCompilerFailed, whose text
    ends with ours.
    """
    unknown = set(options or {}) - {"spec", "inner"}
    if unknown:
        raise ShardingError(
            f"unknown options: {', '.join(sorted(unknown))}", fix="options are 'spec' and 'inner'"
        )
    first = id(options) not in _seen
    _seen[id(options)] = options
    chosen = Options(**(options or {}), is_first_graph=first)
    ranks = context_or_world_of_one()
    group = ranks.group(chosen.spec.mesh) if ranks else None
    try:
        local, context, plan = partitioned(module, chosen, ranks)
    except Exception as error:
        agreement.report_failure(group, error)
        raise
    agreement.agree(group, plan_digest(context, chosen, plan))
    context.constants = len([*local.parameters(), *local.buffers()])
    lowering = Lowering(context, plan)
    try:
        compiled = INNER[chosen.inner](local, example_inputs, lowering)
    except Exception as error:
        agreement.report_failure(group, error, agreement.FINISH)
        raise
    agreement.agree_on_collectives(group, lowering.sequences)
    for listener in LISTENERS:
        listener(plan)
    return checked(compiled, context, chosen.spec, group)


def partitioned(
    module: fx.GraphModule, options: Options, ranks: MosaicContext | None
) -> tuple[fx.GraphModule, Context, Plan]:
    """PIPELINE: from Dynamo's graph to this rank's local program."""
    spec = options.spec
    group = ranks.group(spec.mesh) if ranks else None
    world = world_of(ranks, spec.mesh)
    first = shards.first_call(module)
    if first is not None:
        return shards.passed_through(module, first, spec, world)
    arriving = arriving_shards(module, read_inputs(module), spec, world, group)
    captured = capture(module, global_sizes(module, arriving))
    context = Context(
        spec, world, captured.inputs, captured.mutated, Modes.current(), arriving=arriving
    )
    resumed = resumed_at(captured.graph)
    context.is_resumed = resumed is not None
    context.is_first_graph = options.is_first_graph
    context.worlds = {m.mesh: world_of(ranks, m.mesh) for m in spec.sharded.values()}
    context.graph_text = text_of(captured.graph)
    reports = run_passes(PIPELINE, captured.graph, context, "global")
    plan = plan_of(context, reports)
    announce(plan, resumed)
    plan.graphs["local"] = captured.graph
    local = fx.GraphModule(captured.root, captured.graph)
    return local, context, plan


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
        self.plan.passes += run_passes(LOWERING, graph, self.context, kind)
        self.plan.graphs[kind] = graph
        worlds = (self.context.world, *self.context.worlds.values())
        self.sequences[kind] = sequence(graph, {w.group: w.mesh_axis for w in worlds})


def text_of(graph: fx.Graph) -> str:
    """A graph with its shapes, for the digest; every rank has a device of its own."""
    lines = (f"{n.format_node()} {getattr(n.meta.get('val'), 'shape', '')}" for n in graph.nodes)
    return re.sub(r"\b(cuda|xpu):\d+", r"\1", "\n".join(lines))


def plan_digest(context: Context, options: Options, plan: Plan) -> str:
    decided = [str(a) for a in plan.attentions] + plan.collective_rows() + context.decided
    decided += [plan.axis, plan.layout]
    return agreement.digest(
        graph=context.graph_text,
        spec=options.spec.encode(),
        plan="\n".join(decided),
        versions=torch.__version__,
    )


def checked(
    compiled: Callable[..., Any], context: Context, spec: ShardingSpec, group: Any
) -> Callable[..., Any]:
    """Compare whole inputs across ranks on the first run (or on every run, or never), and mark
    outputs that stay cut with their layout."""
    alone = context.world.size == 1 or dist.get_backend(group) == "fake"
    pending = bool(spec.check_inputs) and not alone

    def run(*args: Any) -> Any:
        nonlocal pending
        if pending:
            whole = [
                (i, a)
                for i, a in zip(context.inputs, args, strict=True)
                if i.index not in context.arriving and (i.is_state or not context.holds_shards)
            ]
            agreement.check_data(group, whole)
            pending = spec.check_inputs == "always"
        outputs = compiled(*args)
        for out, shard in zip(outputs, context.output_shards, strict=False):
            if shard:
                mark(out, shard)
        return outputs

    return run
