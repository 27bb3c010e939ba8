"""One call for a training script: inputs are cut once, blocks are compiled, FSDP2 sums gradients.

    model = mosaic.parallelize(model, spec, fully_shard=True)

A unit is a block (one of the repeated children of the model), or a large layer beside them (an
embedding, a head). Each is compiled by itself, with ShardedTensors in and out; what runs between
them is eager, on ShardedTensors. Under FSDP2 the gradients of a unit's parameters are shares where
the unit is one graph, and its reduce-scatter adds them up: nothing else is sent for them. Where a
unit breaks, and for the root's own parameters, gradients are whole and FSDP2 averages them.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as shard_parameters
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as checkpoint_of

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend import calls, decoding
from mosaic.frontend.backend import mosaic as backend
from mosaic.frontend.deferred import Deferring
from mosaic.frontend.dtensors import with_plain_inputs
from mosaic.frontend.late_logits import Waiting, late
from mosaic.frontend.model_inputs import ModelInputs
from mosaic.frontend.unit_lengths import in_bucket
from mosaic.partition.values import Axis
from mosaic.runtime.mesh import MosaicContext, get_context
from mosaic.torch_private import compile_with_hooks, flattened, without_function_modes

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: M,
    spec: ShardingSpec,
    *,
    blocks: Sequence[nn.Module] | None = None,
    fully_shard: bool | Mapping[str, Any] = False,
    checkpoint: bool = False,
    inner: str = "inductor",
) -> M:
    """Make a model train on sequence-parallel ranks, in place; gives the model back.

    spec: names the dims of the model's inputs, and a method for each axis that is cut. Inputs come
        whole (equal on the ranks that share them), or as ShardedTensors. What holds a cut axis in
        the model's output is a ShardedTensor; a loss is whole. Logits whose loss was made without
        them wait until they are read (``full_tensor()``, ``local``, any op), before backward.
    blocks: the modules that are compiled, each by itself; without them the repeated children of
        the model (the items of its lists of modules of one class).
    fully_shard: apply FSDP2 to each block and to the model, over all ranks; or its arguments
        (``{"mp_policy": ..., "mesh": ranks.mesh["dp", "sp"]}`` for HSDP), over those that have the
        same part of layers that tensor parallelism cuts (``parallelize_module`` comes first). Do
        not call it yourself.
    checkpoint: recompute each block in backward, but for its attention.
    inner: "inductor" or "eager".

    After ``backward`` every parameter, or DTensor of it, has the single-device gradient, averaged
    over data-parallel ranks by FSDP2 (or by DistributedDataParallel around the model).

    Raises ShardingError for a model without repeated children, and for inputs that lack a named
    dim.
    """
    if not isinstance(model, nn.Module):
        raise ShardingError(f"a {type(model).__name__} is no nn.Module", fix="pass a model")
    ranks = get_context()
    units = [*(blocks if blocks is not None else repeated(model))]
    check_units(model, units)
    check_buckets(model, spec, units, checkpoint)
    inputs = ModelInputs(spec, ranks, inspect.signature(model.forward))
    has_units = spec.buckets is None or units != [model]
    parallel = parallel_axes(model, ranks)
    owner = Owner(spec, ranks, bool(fully_shard), inputs, has_units, parallel)
    for unit in units:
        unit.forward = owner.compiled(unit, unit.forward, recomputed=checkpoint, inner=inner)
    whole = replace(owner, shares=False)  # they stay with the model
    for layer in parallel_layers(model, units):
        compile_with_hooks(layer, functools.partial(whole.compiled, layer, inner=inner))
    if fully_shard:
        layers = large_layers(model, units)
        for layer in layers:
            layer.forward = owner.compiled(layer, layer.forward, inner=inner)
        shard_all(model, [*units, *layers], owner, {} if fully_shard is True else dict(fully_shard))
    if has_units:
        model.forward = with_inputs_cut(model.forward, inputs, bool(fully_shard))
    return model


def with_inputs_cut(
    forward: Callable[..., Any], inputs: ModelInputs, is_sharded: bool
) -> Callable[..., Any]:
    """A model's forward, on its inputs cut; a step of decoding on whole ones."""
    waiting = Waiting()

    def logits(*args: Any, **kwargs: Any) -> Any:
        found = late(*args, **kwargs)
        if found is not None and is_sharded:
            waiting.note(found)
        return found

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        waiting.expire()
        if inputs.is_step(*args, **kwargs):
            args, kwargs = decoding.made_whole((args, kwargs))
            return forward(*args, **kwargs)
        args, kwargs = inputs.cut(*args, **kwargs)
        with Deferring(logits):
            found = forward(*args, **kwargs)
            inputs.settle()
            return decoding.single_rows_whole(found)

    return call


@dataclass(eq=False)
class Owner:
    """Of one parallelized model: who adds its gradients up, and who is told how it is cut."""

    spec: ShardingSpec
    ranks: MosaicContext
    shares: bool  # where a unit is one graph, for FSDP2 to add up
    inputs: ModelInputs
    has_units: bool  # that are parts of the model; else it is compiled whole, on whole inputs
    parallel: tuple[str, ...] = ()  # mesh axes over which the model's layers are cut
    divisors: dict[nn.Module, int] = field(default_factory=dict)
    shards_over_one: bool = False  # FSDP2's mesh shards over one rank, and replicates over all

    def planned(self, axes: Sequence[Axis]) -> None:
        """A graph of a unit was planned, and cuts these axes."""
        for axis in axes:
            self.inputs.note(axis)

    def compiled(
        self,
        unit: nn.Module,
        forward: Callable[..., Any],
        *,
        recomputed: bool = False,
        inner: str,
    ) -> Callable[..., Any]:
        """The unit's forward, compiled; FSDP2 is told how to divide what it gives."""
        if any(isinstance(w, DTensor) for w in unit.parameters()):
            forward = with_plain_inputs(forward)
        if recomputed:
            forward = functools.partial(checkpoint_of, forward, use_reentrant=False)
        # The model's own inputs are compared before every call: units have nothing else.
        spec = replace(self.spec, check_inputs=self.spec.check_inputs and "first")
        if not self.has_units:
            stays = "shards" if self.spec.outputs == "whole" else self.spec.outputs
            spec = replace(self.spec, outputs=stays)
        options: dict[str, Any] = {"spec": spec, "inner": inner, "owner": self}
        run = torch.compile(forward, backend=backend, options=options)

        @functools.wraps(unit.forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            buckets = self.spec.buckets if self.has_units else None
            seen = in_bucket(buckets, (args, kwargs), self.inputs.length)
            with without_function_modes(Deferring), seen:  # Dynamo would trace the mode
                result = run(*args, **kwargs)
            if self.shares and torch.is_grad_enabled():
                self.divide(unit, calls.gave_shares(result))
            return result

        return call

    @property
    def length(self) -> int:
        """Of the model's inputs now, if there are buckets; else 0."""
        return self.inputs.length

    @property
    def sp_size(self) -> int:
        """How many ranks share a sample, and add up a parameter's gradient or have all of it."""
        shared = {*self.ranks.axes} - {"dp", *self.parallel}
        return prod(self.ranks.size(axis) for axis in shared)

    def divide(self, unit: nn.Module, shares: bool) -> None:
        """Let FSDP2 divide the sum of a unit's gradients by the number of ranks that have each."""
        divisor = self.ranks.dp_size * (1 if shares else self.sp_size)
        if self.divisors.setdefault(unit, divisor) != divisor:
            raise ShardingError(
                f"{type(unit).__name__} was one graph in an earlier call and is several now, or "
                "the reverse: its gradients cannot be added up",
                fix="let it break the graph always or never; raise "
                "torch._dynamo.config.recompile_limit if Dynamo runs it eagerly",
            )
        if isinstance(unit, FSDPModule):
            self.set_divisor(unit, divisor)

    def set_divisor(self, unit: FSDPModule, divisor: int) -> None:
        """Torch divides twice by a factor where a shard has one rank: there its own average over
        all ranks is the right one."""
        if not self.shards_over_one or divisor == 1:
            unit.set_gradient_divide_factor(float(divisor))
        elif divisor != self.ranks.dp_size * self.sp_size:
            raise ShardingError(
                "FSDP2's mesh shards over one rank, where torch divides gradients twice",
                divisor=divisor,
                fix="give it a mesh whose last dim has several ranks, or leave the mesh out",
            )


# --- units --------------------------------------------------------------------------------------


def repeated(model: nn.Module) -> list[nn.Module]:
    """The items of the model's outermost lists of several modules of one class.

    Raises ShardingError if there is none.
    """
    found: dict[nn.Module, None] = {}
    for module in model.modules():  # from outside to inside
        items = list(module.children()) if isinstance(module, LISTS) else []
        is_inside = any(module in block.modules() for block in found)
        if len(items) > 1 and len(set(map(type, items))) == 1 and not is_inside:
            found |= dict.fromkeys(item for item in items if [*item.parameters()])
    if not found:
        raise ShardingError(
            f"{type(model).__name__} has no list of repeated modules",
            fix="say what is compiled: blocks=[model.first, model.second], or blocks=[model]",
        )
    return list(found)


LISTS = (nn.ModuleList, nn.Sequential)


def large_layers(model: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """Embeddings and linear layers beside the units. One that shares its weight with another (a
    tied head) stays with the model: FSDP2 takes a parameter in one place only. So does a head: its
    loss is made without logits, behind it. And one that tensor parallelism cuts: its hooks, which
    run around it, make DTensors."""
    inside = {module for unit in units for module in unit.modules()}
    every = model.named_parameters(remove_duplicate=False)
    times = Counter(id(parameter) for _, parameter in every)
    return [
        module
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.Linear))
        and module not in inside
        and module is not model
        and not has_dtensors(module)
        and not is_head(module)
        and all(times[id(parameter)] == 1 for parameter in module.parameters())
    ]


def parallel_layers(model: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """Layers beside the units that tensor parallelism cuts (an embedding, a head)."""
    inside = {module for unit in units for module in unit.modules()}
    return [m for m in model.modules() if m not in inside and has_dtensors(m)]


def is_head(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.out_features > layer.in_features


def has_dtensors(layer: nn.Module) -> bool:
    return any(isinstance(w, DTensor) for w in layer.parameters(recurse=False))


def check_units(model: nn.Module, units: Sequence[Any]) -> None:
    """Raise ShardingError for what is no part of the model."""
    parts = set(model.modules())
    for unit in units:
        if not isinstance(unit, nn.Module) or unit not in parts:
            raise ShardingError(
                f"{type(unit).__name__} is among the blocks, and no part of the model",
                fix="pass modules of the model: blocks=list(model.layers)",
            )
        if isinstance(unit, FSDPModule):
            raise ShardingError(
                f"{type(unit).__name__} is sharded by FSDP2 already",
                fix="leave that to mosaic.parallelize(..., fully_shard=True)",
            )


def check_buckets(
    model: nn.Module, spec: ShardingSpec, units: Sequence[nn.Module], recomputed: bool
) -> None:
    """Raise ShardingError for buckets of a whole model that is recomputed: its names are those of
    its forward."""
    if spec.buckets is not None and units == [model] and recomputed:
        raise ShardingError(
            "buckets need the inputs' names, which torch.utils.checkpoint hides",
            fix="leave blocks out, or call torch.utils.checkpoint inside of the model",
        )


# --- parameters ---------------------------------------------------------------------------------


def shard_all(
    model: nn.Module, units: Sequence[nn.Module], owner: Owner, given: dict[str, Any]
) -> None:
    """FSDP2 for each unit, then for what is left of the model."""
    ranks = owner.ranks
    if ranks.mesh is None:  # a single process
        return
    every = mesh_of_all(ranks, owner.parallel)
    mesh = given.pop("mesh", None) or every
    missing = {*every.mesh.flatten().tolist()} - {*mesh.mesh.flatten().tolist()}
    if missing:
        raise ShardingError(
            f"FSDP2's mesh leaves out ranks {sorted(missing)}",
            fix="give it all: leave the mesh out, or ranks.mesh['dp', 'sp'] for HSDP",
        )
    owner.shards_over_one = mesh.ndim > 1 and mesh.size(mesh.ndim - 1) == 1
    for module in [*(unit for unit in units if unit is not model), model]:
        shard_parameters(module, mesh=mesh, **given)
        sums: Any = module
        if ranks.device.type == "cpu":  # gloo adds, and does no more
            sums.set_force_sum_reduction_for_comms(True)
        owner.set_divisor(sums, ranks.dp_size * owner.sp_size)


def mesh_of_all(ranks: MosaicContext, parallel: Sequence[str]) -> DeviceMesh:
    """All ranks that have the same part of each layer."""
    assert ranks.mesh is not None
    axes = tuple(axis for axis in ranks.axes if axis not in parallel)
    return flattened(ranks.mesh, axes) if len(axes) > 1 else ranks.mesh[axes]


def parallel_axes(model: nn.Module, ranks: MosaicContext) -> tuple[str, ...]:
    """The mesh axes that parameters are DTensors over."""
    cut = (w for w in model.parameters() if isinstance(w, DTensor))
    names = {name for w in cut for name in w.device_mesh.mesh_dim_names or ()}
    return tuple(axis for axis in ranks.axes if axis in names)
