"""What a Trainer may not be when it is prepared."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from accelerate.utils import DistributedType, DynamoBackend

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.runtime.mesh import MosaicContext


def check_trainer(
    trainer: Any, spec: ShardingSpec, ranks: MosaicContext, fully_shard: Any, plugin: Any
) -> None:
    """Raise ShardingError unless the ranks, the spec and the Trainer fit together."""
    for method in spec.sharded.values():
        ranks.size(method.mesh)  # raises where there is no such mesh axis
    check_time(trainer)
    check_processes(trainer, ranks)
    check_sharding(trainer, fully_shard, plugin)
    check_options(trainer, bool(fully_shard) or plugin is not None)


def check_time(trainer: Any) -> None:
    if hasattr(trainer, "ranks"):
        raise ShardingError("the Trainer was prepared before", fix="call prepare once")
    if trainer.model_wrapped is not trainer.model or trainer.accelerator._models:
        raise ShardingError(
            "the Trainer has trained or evaluated before it was prepared",
            fix="call mosaic.integrations.prepare(trainer) right after it is made",
        )


def check_processes(trainer: Any, ranks: MosaicContext) -> None:
    """accelerate and Mosaic know the same ranks."""
    theirs, ours = trainer.accelerator.num_processes, dist.get_world_size() if ranks.mesh else 1
    if theirs != ours:
        raise ShardingError(
            f"accelerate has {theirs} processes, and Mosaic {ours} ranks",
            fix="start the script by torchrun, and call mosaic.init in each process",
        )
    if trainer.args.n_gpu > 1:
        raise ShardingError(
            f"one process has {trainer.args.n_gpu} GPUs, over which Trainer copies the model",
            fix="start one process for each GPU: torchrun --nproc-per-node=8 your_script.py",
        )


def check_sharding(trainer: Any, fully_shard: Any, plugin: Any) -> None:
    """FSDP2 is asked for once, and before there is an optimizer."""
    if fully_shard and plugin is not None:
        raise ShardingError(
            "the Trainer has fsdp, and prepare has fully_shard",
            fix="leave one of them out; both apply FSDP2",
        )
    if trainer.args.fsdp and plugin is None:
        raise ShardingError(
            "fsdp_config has xla, for TPUs", fix='leave it out, or fsdp_config={"version": 2}'
        )
    if (fully_shard or plugin is not None) and trainer.optimizer is not None:
        raise ShardingError(
            "the Trainer has an optimizer, of parameters that FSDP2 replaces",
            fix="leave optimizers out, and give its class: Trainer(optimizer_cls_and_kwargs=...)",
        )


def check_seen(checkpoint: Any, ranks: MosaicContext) -> None:
    """Raise ShardingError unless all ranks find the same weights: Trainer warns, and goes on."""
    files = sorted(f for f in os.listdir(checkpoint) if f.endswith((".safetensors", ".bin")))
    if ranks.mesh is None:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, files)
    unseen = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
    if unseen:
        raise ShardingError(
            f"ranks {unseen} do not find the weights of the best checkpoint that rank 0 has",
            fix="write to a folder that all ranks share (output_dir), or set save_on_each_node",
        )


def check_options(trainer: Any, is_sharded: bool) -> None:
    """Nobody else makes, cuts or compiles the model, or deals out batches."""
    args, accelerator = trainer.args, trainer.accelerator
    others = {
        "deepspeed": accelerator.distributed_type == DistributedType.DEEPSPEED,
        "parallelism_config": args.parallelism_config is not None,
        "torch_compile": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "dispatch_batches": bool(accelerator.dataloader_config.dispatch_batches),
        "split_batches": bool(accelerator.dataloader_config.split_batches),
        "model_init": trainer.model_init is not None,
        "save_on_each_node": is_sharded and args.save_on_each_node,
    }
    for option in (option for option, is_set in others.items() if is_set):
        raise ShardingError(
            f"{option} is set, and {WHAT[option]}", fix=f"leave {option} out; {WAYS_OUT[option]}"
        )


WHAT = {
    "deepspeed": "DeepSpeed would cut the model and its gradients",
    "parallelism_config": "accelerate would arrange the ranks in another way",
    "torch_compile": "accelerate would compile the model once more",
    "dispatch_batches": "accelerate would deal batches out to all ranks",
    "split_batches": "accelerate would deal batches out to all ranks",
    "model_init": "Trainer would make another model when it trains",
    "save_on_each_node": "one rank alone gets the whole of what FSDP2 has cut",
}
SHARD = "prepare(trainer, fully_shard=True) applies FSDP2"
READ = "every rank reads its own batches"
WAYS_OUT = {
    "deepspeed": SHARD,
    "parallelism_config": "mosaic.init(sp_size=...) says which ranks share a sequence",
    "torch_compile": "prepare compiles the blocks of the model by Mosaic",
    "dispatch_batches": READ,
    "split_batches": READ,
    "model_init": "Trainer(model=...) takes one",
    "save_on_each_node": "copy the first node's files",
}
