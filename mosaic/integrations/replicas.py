"""What accelerate calls a process is a replica: the ranks that share one batch count once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mosaic.api.errors import UnsupportedError
from mosaic.runtime.deferred_tensor import DeferredTensor
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import pytree


class Replicas:
    """accelerate's state of the processes, in which there are as many as there are replicas. Who is
    the main process, and what all of them wait for, stays as it is."""

    def __init__(self, state: Any, ranks: MosaicContext, process_index: int):
        self.state = state
        self.num_processes, self.process_index = ranks.dp_size, process_index
        self.distributed_type = PartialState().distributed_type  # without accelerate's FSDP
        self.is_fsdp2 = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)


@contextmanager
def counting_replicas(
    args: TrainingArguments, ranks: MosaicContext, process_index: int | None = None
) -> Iterator[None]:
    """Within it, ``args.world_size`` is the number of replicas."""
    every: Any = args.distributed_state
    index = every.process_index if process_index is None else process_index
    args.distributed_state = Replicas(every, ranks, index)
    try:
        yield
    finally:
        args.distributed_state = every


def share_batches(accelerator: Accelerator, ranks: MosaicContext, is_cast: bool) -> None:
    """Let the ranks of one replica get the same batches, and count as one where results are
    gathered. FSDP2 may cast the model's parameters and inputs (``is_cast``)."""
    own: Any = accelerator
    own.state = Replicas(accelerator.state, ranks, ranks.dp_rank)
    own.dataloader_config.dispatch_batches = False  # which would deal batches out to all ranks
    own.gather = partial(gathered, ranks=ranks)
    own.gather_for_metrics = partial(gathered_for_metrics, accelerator.gather_for_metrics)
    own.prepare_data_loader = partial(prepared_loader, accelerator.prepare_data_loader, ranks)
    prepare = partial(prepared_model, accelerator, accelerator.prepare_model, ranks)
    own.prepare_model = partial(uncast_model, accelerator) if is_cast else prepare


def gathered(tensor: Any, ranks: MosaicContext) -> Any:
    """``Accelerator.gather`` of one rank for each replica: what it holds, joined along dim 0."""
    group = ranks.group("dp") if ranks.dp_size > 1 else None

    def one(x: Tensor) -> Tensor:
        x = (x.clone()[None] if x.ndim == 0 else x).contiguous()
        if group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(ranks.dp_size)]
        dist.all_gather(parts, x, group)
        return torch.cat(parts)

    return recursively_apply(one, whole(tensor), error_on_other_type=True)


def gathered_for_metrics(gather: Any, data: Any, use_gather_object: bool = False) -> Any:
    """accelerate gathers what are no tensors from all ranks, so that samples would come twice."""
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        use_gather_object = True
    if use_gather_object:
        raise UnsupportedError(
            "objects would be gathered for metrics from all ranks, and come twice",
            fix="gather tensors: leave eval_use_gather_object out",
        )
    return gather(data)


def prepared_loader(
    prepare: Any, ranks: MosaicContext, loader: DataLoader[Any], *args: Any, **kwargs: Any
) -> Any:
    """``Accelerator.prepare_data_loader``; workers of ranks that share a batch are seeded alike."""
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and "rank" in seed.keywords:  # transformers' seed_worker
        loader.worker_init_fn = partial(seed.func, **{**seed.keywords, "rank": ranks.dp_rank})
    return prepare(loader, *args, **kwargs)


def prepared_model(
    accelerator: Any,
    prepare: Any,
    ranks: MosaicContext,
    model: nn.Module,
    device_placement: bool | None = None,
    evaluation_mode: bool = False,
) -> Any:
    """``Accelerator.prepare_model``: DistributedDataParallel averages over replicas, and is not
    used where there is one, or where FSDP2 does it. Gradients are whole on each rank."""
    if ranks.dp_size == 1 or isinstance(model, FSDPModule):
        return prepare(model, device_placement, evaluation_mode=True)
    handler = accelerator.ddp_handler
    options = {**handler.to_kwargs(), "process_group": ranks.group("dp")}
    hook = handler.register_comm_hook
    accelerator.ddp_handler = SimpleNamespace(to_kwargs=lambda: options, register_comm_hook=hook)
    try:
        prepared = prepare(model, device_placement, evaluation_mode)
    finally:
        accelerator.ddp_handler = handler
    # accelerate prepares nothing twice, and would train without DistributedDataParallel then.
    model._is_accelerate_prepared = not evaluation_mode  # type: ignore[assignment]
    return prepared


def uncast_model(accelerator: Any, model: nn.Module, *_: Any, **__: Any) -> Any:
    """``Accelerator.prepare_model`` of a model that FSDP2 casts, without autocast: as accelerate
    does under FSDP2."""
    accelerator._models.append(model)
    return model


def whole(values: Any) -> Any:
    """Nested values, of which nothing is cut, or waits to be made."""
    values = pytree.tree_map_only(DeferredTensor, DeferredTensor.made, values)
    return pytree.tree_map_only(ShardedTensor, ShardedTensor.full_tensor, values)
