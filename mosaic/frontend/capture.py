"""From Dynamo's graph to functional pre-dispatch ATen at global sizes, with nothing lost.

``aot_export_module(pre_dispatch=True)`` alone would inline a ``torch.autograd.Function`` (losing
its backward), stop at a ``torch.utils.checkpoint`` and trace an inner autocast region in float32.
So Dynamo's graph is run by an interpreter that

* recurses into checkpointed bodies and marks their nodes, which the partitioner reads later;
* keeps each autograd.Function as one opaque node that holds both of its bodies;
* enters autocast regions for real, so that every cast becomes a node of its own;
* writes out what is inside of a ``torch.vmap``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from mosaic.api.errors import UnsupportedError
from mosaic.frontend import dtensors, flash, flex, recurrences
from mosaic.frontend.block_masks import BlockCheck, Blocks, checks_of
from mosaic.frontend.fused import UNFUSED
from mosaic.frontend.sharded_inputs import placeholder_values
from mosaic.frontend.vmapped import Region, check_transforms, written_out
from mosaic.graph.history import with_history
from mosaic.graph.inputs import Input, Policy
from mosaic.graph.modes import Modes
from mosaic.graph.source import nodes_of, where
from mosaic.graph.strides import reach
from mosaic.graph.unexpected import blamed_on
from mosaic.runtime.autograd_functions import AUTOGRAD_FUNCTIONS
from mosaic.runtime.deferred_tensor import DeferredTensor, flattened, regrouped
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import (
    INLINED,
    FakeTensorMode,
    aot_export_module,
    autograd_function_apply,
    enter_autocast,
    exit_autocast,
    flex_op,
    get_data,
    is_alias,
    is_mesh,
    no_tracing_context,
    placeholder_source,
    policy_of,
    preserve_node_meta,
    pytree,
    recompute_marks,
    rename_afresh,
    set_grad_enabled,
    tag_activation_checkpoint,
    with_composites,
    without_cudnn,
    without_effects,
)


@dataclass(frozen=True)
class Captured:
    """The global program: nodes have ``val``; mutated inputs are written back by index."""

    graph: fx.Graph
    root: torch.nn.Module  # holds the constants
    inputs: tuple[Input, ...]
    mutated: tuple[int, ...]  # the first outputs are the new values of these inputs
    policies: Mapping[int, Policy] = field(default_factory=dict)  # of checkpoints, by ac_graph_id
    checks: Sequence[BlockCheck] = ()  # of BlockMasks, before a run


@torch.library.custom_op("mosaic::autograd_function", mutates_args=())
def autograd_function(tensors: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """A user's autograd.Function in the global graph; ``partition`` re-emits both its bodies."""
    raise AssertionError("mosaic::autograd_function stands for a call and is never run")


@autograd_function.register_fake
def _(tensors: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    with torch.no_grad():
        out = AUTOGRAD_FUNCTIONS.run(number, tensors)
    outs = out if isinstance(out, (tuple, list)) else [out]
    return [torch.empty_like(o) for o in outs]


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph under the tracer; see the module's docstring."""

    def __init__(
        self,
        module: fx.GraphModule,
        modes: Modes,
        policies: dict[int, Policy],
        histories: dict[fx.Node, list[fx.Node]],
        blocks: list[Blocks],
    ):
        super().__init__(module, garbage_collect_values=False)  # a vmap asks for its operands late
        self.modes = modes
        self.policies = policies
        self.histories = histories  # the tracer runs all twice, and knows of gradients at first
        self.blocks = blocks  # of the BlockMasks of flex attentions
        self.ambient = modes
        self.outer: list[Modes] = []
        self.mapped = Region()

    def run_node(self, n: fx.Node) -> Any:
        if self.mapped.takes(n):
            return self.vmap()
        if n.target == "item" and isinstance(n.meta.get("example_value"), torch.SymFloat):
            # A float attribute (LayerNorm.eps) under dynamic=True; with a guard on it.
            return float(n.meta["example_value"])
        # The tracer copies "custom" to every node that this one becomes.
        n.meta["custom"] = {**n.meta.get("custom", {}), "modes": self.modes}
        if (move := dtensors.move_of(n)) is not None:
            return move(self.env[n.args[0]])
        with blamed_on(n):
            if n not in self.histories:
                self.histories[n] = self.hidden_write(n)
            hidden = [self.env[y] for y in self.histories[n]]
            return self.run_hidden(n, hidden) if hidden else super().run_node(n)

    def run_hidden(self, n: fx.Node, written: list[Tensor]) -> Any:
        """Run a write of which autograd is not told; what it changes keeps its history."""
        marks, modes, into = n.meta["custom"], self.modes, self.env[n.args[0]]
        marks["modes"] = replace(modes, grad=True)
        before = [x.clone() for x in written]
        marks["modes"] = modes
        result = super().run_node(n)
        if modes.grad and into.requires_grad:
            raise UnsupportedError(
                "what has a gradient is written into a detached tensor, in the memory of one that "
                "has another",
                sizes=list(into.shape),
                fix="write into a copy: x.detach().clone()",
            )
        marks["modes"] = replace(modes, grad=True)
        for x, old in zip(written, before, strict=True):
            x.copy_(with_history(old, x.detach()))
        return result

    def hidden_write(self, n: fx.Node) -> list[fx.Node]:
        """The tensors with a history whose values this node changes, and autograd is not told: it
        writes under no_grad, or into what is detached."""
        into = self.env.get(n.args[0]) if n.args and writes_in_place(n) else None
        if not self.ambient.grad or not isinstance(into, Tensor):
            return []
        found = {y: x for y, x in self.env.items() if isinstance(x, Tensor) and x.requires_grad}
        found = {y: x for y, x in found.items() if not x.is_leaf and is_alias(x, into)}
        if self.modes.grad:  # autograd knows of those that it takes for views of one tensor
            found = {y: x for y, x in found.items() if base_of(x) is not base_of(into)}
        return [y for y, x in found.items() if not any(x._base is z for z in found.values())]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is tag_activation_checkpoint:
            return self.checkpoint(*args)
        if target in INLINED:
            return self.inner(args[0]).run(*args[INLINED[target] :])
        if target is flex_op:
            return flex.written_out(flex.Call(*args), self.run_inside, self.blocks)
        if target is autograd_function_apply:
            return self.autograd_function(target, args, kwargs)
        if target is enter_autocast:
            return self.enter_autocast(*args)
        if target is exit_autocast:
            return self.switch(replace(self.outer.pop(), grad=self.modes.grad))
        if target is set_grad_enabled:
            return self.switch(replace(self.modes, grad=args[0]))
        ours = flash.call_of(target) or recurrences.call_of(target)
        target = ours or UNFUSED.get(target, target)
        if kwargs.get("out") is not None:
            return written_to(kwargs["out"], target(*args, **{**kwargs, "out": None}))
        return super().call_function(target, args, kwargs)

    def vmap(self) -> None:
        region = self.mapped
        if region.depth or not region.nodes:
            return
        self.mapped = Region()
        values = [self.env[operand] for operand in region.operands()]
        body = written_out(region, self.module, values)
        outs = self.inner(body).run(*values)
        self.env.update(zip(region.results(), outs, strict=True))

    def checkpoint(self, body: fx.GraphModule, *args: Any) -> Any:
        marks, policy = recompute_marks(), policy_of(body)
        if policy is not None:
            self.policies[marks["ac_graph_id"]] = policy
        for node in body.graph.nodes:
            node.meta.update(marks)
        return self.inner(body).run(*args)

    def run_inside(self, body: fx.GraphModule, *operands: Any) -> Any:
        return self.inner(body).run(*operands)

    def inner(self, body: fx.GraphModule) -> _Interpreter:
        return _Interpreter(body, self.modes, self.policies, self.histories, self.blocks)

    def autograd_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What stays behind in the table are the bodies and the constants, not the traced tensors.
        template = tuple(torch.empty(0) if isinstance(a, torch.Tensor) else a for a in args)
        number = AUTOGRAD_FUNCTIONS.add(target, template, kwargs)
        outs = autograd_function([a for a in args if isinstance(a, torch.Tensor)], number)
        body = args[0]
        single = not isinstance(body.graph.output_node().args[0][0], (tuple, list))
        return outs[0] if single else tuple(outs)

    def enter_autocast(self, device: str, dtype: Any, enabled: bool, cache: Any = None) -> None:
        self.outer.append(self.modes)
        self.switch(self.modes.with_autocast(device, enabled, dtype))

    def switch(self, modes: Modes) -> None:
        self.modes = modes
        modes.autocast_on()


def base_of(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def writes_in_place(n: fx.Node) -> bool:
    """Whether a node of Dynamo's writes into its first operand."""
    if n.op not in ("call_function", "call_method"):
        return False
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    if getattr(n.target, "__module__", "") == "_operator":
        return name == "setitem" or (name[0] == "i" and hasattr(operator, name[1:]))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def written_to(out: Any, result: Any) -> Any:
    """``out=`` as a write that the tracer sees, with no gradient: torch has none for it."""
    for into, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(result), strict=True):
        if into.shape != value.shape:
            raise UnsupportedError(
                "out= of another shape than the result would be resized",
                sizes=f"{list(into.shape)}, {list(value.shape)}",
                fix="give an out= of the result's shape, or use the result",
            )
        into.copy_(value.detach())
    return out


def read_inputs(module: fx.GraphModule) -> tuple[Input, ...]:
    """Names and order of the graph's inputs; must be read from Dynamo's graph, before capture."""
    sources: list[tuple[str, bool]] = []
    for node in module.graph.find_nodes(op="placeholder"):
        source, value = placeholder_source(node), node.meta["example_value"]
        parts = len(value.leaves) if isinstance(value, DeferredTensor) else 0
        sources += [(f"{source[0]}.leaf_{i}", False) for i in range(parts)] or [source]
    return tuple(Input(i, *source) for i, source in enumerate(sources))


def value_of(placeholder: fx.Node) -> Any:
    """What an input is like; no size where nobody reads that (it may be any), and no mesh of
    DTensors: what is done with it is in their calls."""
    value = placeholder.meta["example_value"]
    is_unread = isinstance(value, torch.SymInt) and not placeholder.users
    return 0 if is_unread or is_mesh(value) else value


def specialise(value: Any, size: Callable[[Any], int] = int) -> Any:
    """A placeholder's value at known sizes. Dynamo puts a guard on each of which ``int`` is asked,
    so that every other size is compiled anew."""
    if isinstance(value, torch.SymInt):
        return size(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = [size(n) for n in value.shape], [size(n) for n in value.stride()]
    return shape, stride, value.dtype, value.device, value.requires_grad


def capture(module: fx.GraphModule, size: Callable[[Any], int] = int) -> Captured:
    """Trace Dynamo's graph into functional ATen with static global sizes (``size`` of Dynamo's).

    Raises UnsupportedError for what would not be the same program.

    The graph's inputs keep their order. ``meta["val"]`` of every node is a fake tensor of one mode
    made here: sizes are known, and no symbol of Dynamo's leaks in.
    """
    check_transforms(module)
    detach_data(module)
    flash.forget_lengths(module)
    inputs = read_inputs(module)
    given = [value_of(n) for n in module.graph.find_nodes(op="placeholder")]
    known = [specialise(value, size) for value in flattened(given)]
    mode = FakeTensorMode()
    with mode:
        fakes = [_empty(*v) if isinstance(v, tuple) else v for v in known]

    ambient = Modes.current()
    policies: dict[int, Policy] = {}
    histories: dict[fx.Node, list[fx.Node]] = {}
    blocks: list[Blocks] = []

    class Program(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            run = _Interpreter(module, ambient, policies, histories, blocks).run
            return run(*regrouped(args, given, size))

    traced: fx.GraphModule
    try:
        with (
            no_tracing_context(), preserve_node_meta(), with_composites(),
            without_effects(), without_cudnn(),
        ):  # fmt: skip
            traced, signature = aot_export_module(
                Program(), fakes, trace_joint=False, pre_dispatch=True
            )
    finally:
        ambient.autocast_on()
    # A draw that nothing reads would move the generator on some ranks only, or for some p only.
    traced.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in traced.graph.nodes:
        node.meta["modes"] = node.meta.get("custom", {}).get("modes", ambient)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    offsets = storage_offsets(module)
    for node, source, fake in zip(placeholders, inputs, fakes, strict=True):
        node.meta["is_state"] = source.is_state
        node.meta["storage_offset"] = offsets[source.index]
        node.meta["requires_grad"] = isinstance(fake, torch.Tensor) and fake.requires_grad
    names = list(signature.user_inputs)
    rename_afresh(
        traced.graph, {n: identifier(i.name) for n, i in zip(placeholders, inputs, strict=True)}
    )
    mutated = tuple(names.index(name) for name in signature.user_inputs_to_mutate.values())
    refuse_learned(traced.graph, inputs, mutated)
    refuse_shared(module, traced.graph, inputs, mutated)
    checks = checks_of(traced.graph, blocks)
    return Captured(traced.graph, traced, inputs, mutated, policies, checks)


def detach_data(module: fx.GraphModule) -> None:
    """``x.data`` as a detach: the tracer would look through it, and gradients would come back."""
    for node in nodes_of(module):
        if node.target is get_data:
            node.target = torch.detach


def refuse_learned(graph: fx.Graph, inputs: tuple[Input, ...], mutated: tuple[int, ...]) -> None:
    """Raise UnsupportedError where a parameter is changed in place under no_grad: what comes after
    it uses another tensor in the captured program, and the parameter would lose its gradient."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for index, new in zip(mutated, graph.output_node().args[0], strict=False):
        without_grad = inputs[index].is_state or not new.meta["modes"].grad
        if placeholders[index].meta["requires_grad"] and without_grad:
            raise UnsupportedError(
                f"{inputs[index].name} is changed in place under no_grad, and learned",
                where=where(new),
                fix="change it outside of the compiled model (after an optimiser's step), "
                "or use a changed copy: w.clamp(-1, 1), not w.clamp_(-1, 1) or max_norm",
            )


def storage_offsets(module: fx.GraphModule) -> list[int]:
    """Where in its memory each input begins."""
    return [int(v.storage_offset()) if isinstance(v, Tensor) else 0 for v in held(module)]


def held(module: fx.GraphModule) -> list[Any]:
    """The inputs as memory: of one that is cut this rank's part."""
    values = [n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder")]
    return [v._local if isinstance(v, ShardedTensor) else v for v in flattened(values)]


def refuse_shared(
    module: fx.GraphModule, graph: fx.Graph, inputs: tuple[Input, ...], mutated: tuple[int, ...]
) -> None:
    """Raise UnsupportedError where an input is written to whose memory another one shares: they are
    captured as two tensors, and the other would not change."""
    values = held(module)
    for index, new in zip(mutated, graph.output_node().args[0], strict=False):
        refuse_open(flattened(placeholder_values(module))[index], inputs[index].name, new)
        for other, value in enumerate(values):
            if other != index and is_alias(value, values[index]) and touch(value, values[index]):
                raise UnsupportedError(
                    f"{inputs[index].name} is written to, and {inputs[other].name} shares its "
                    "memory",
                    where=where(new),
                    fix=f"pass a copy of one of them: {inputs[other].name}.clone()",
                )


def refuse_open(x: Any, name: str, new: fx.Node) -> None:
    """Raise UnsupportedError where a tensor is written to of which Dynamo has seen no memory."""
    if isinstance(x, ShardedTensor) and x.bucket is not None:
        raise UnsupportedError(
            f"{name} is written to in a block that takes many lengths, and may share its memory",
            where=where(new),
            fix=f"write into a copy ({name}.clone()), or leave buckets out",
        )


def touch(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the stretches of memory in which a and b lie meet."""
    starts = [int(x.storage_offset()) for x in (a, b)]
    stops = [n + reach(x.shape, x.stride()) for n, x in zip(starts, (a, b), strict=True)]
    return max(starts) < min(map(int, stops))


def identifier(name: str) -> str:
    """``layers.0.weight`` -> ``layers_0_weight``."""
    return re.sub(r"\W+", "_", name).strip("_") or "value"


def _empty(
    shape: list[int], stride: list[int], dtype: torch.dtype, device: torch.device, grad: bool
) -> torch.Tensor:
    out = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return out.requires_grad_(grad)
