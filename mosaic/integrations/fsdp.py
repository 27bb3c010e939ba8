"""accelerate's FSDP2 (``TrainingArguments(fsdp=True, fsdp_config={...})``), applied by Mosaic.

accelerate would shard what is compiled, on GPUs only, and send each gradient once more. So its
options become arguments of ``mosaic.parallelize``, and accelerate sees a run without FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from mosaic.api.errors import ShardingError


def plugin_of(trainer: Any) -> Any:
    """What accelerate was told of FSDP; None where FSDP is off. On CPUs accelerate forgets it."""
    state, given = trainer.accelerator.state, trainer.args.fsdp_plugin_args
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and given is not None:
        plugin = FullyShardedDataParallelPlugin(**given)
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
    return plugin


def sharding_of(plugin: Any, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """The plugin's options, as arguments of ``mosaic.parallelize``. The model gets the weights
    that accelerate would give it.

    Raises ShardingError for options that have no translation.
    """
    check_plugin(plugin)
    blocks, options = blocks_of(plugin, model), {}
    if plugin.cpu_ram_efficient_loading:
        share_weights(model, device)
    if plugin.mixed_precision_policy is not None:
        upcast(model)
        # A loss in bf16 would be logged with three digits.
        options["mp_policy"] = replace(plugin.mixed_precision_policy, output_dtype=None)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    if not plugin.reshard_after_forward:
        options["reshard_after_forward"] = False
    is_recomputed = plugin.activation_checkpointing
    return {"fully_shard": options or True, "blocks": blocks, "checkpoint": is_recomputed}


def blocks_of(plugin: Any, model: nn.Module) -> list[nn.Module] | None:
    """The modules that are sharded, and compiled, each by itself. None: the repeated ones."""
    if plugin.auto_wrap_policy is None:
        return [model]
    if plugin.transformer_cls_names_to_wrap is None:
        return None
    names = {*plugin.transformer_cls_names_to_wrap}
    missing = names - {type(module).__name__ for module in model.modules()}
    if missing:
        raise ShardingError(
            f"transformer_layer_cls_to_wrap names {', '.join(sorted(missing))}, and "
            f"{type(model).__name__} has no such module",
            fix="leave it out: the repeated blocks of the model are sharded",
        )
    return [*outermost(model, names)]


def outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    """The modules of these classes that are inside of no other."""
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from outermost(child, names)


def upcast(model: nn.Module) -> None:
    """What is trained is float32, and is cast where it is gathered."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def share_weights(model: nn.Module, device: torch.device) -> None:
    """Of a model that rank 0 alone has loaded."""
    if not dist.is_initialized():
        return
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            sent = x.detach().to(device, copy=True)
            dist.broadcast(sent, 0)
            x.copy_(sent)


def check_plugin(plugin: Any) -> None:
    """Raise ShardingError for what Mosaic has no counterpart of."""
    is_by_size = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    unknown = {
        "version": plugin.fsdp_version != 2,
        "auto_wrap_policy": is_by_size is size_based_auto_wrap_policy,
        "state_dict_type": plugin.state_dict_type.name != "FULL_STATE_DICT",
        "ignored_modules": plugin.ignored_modules is not None,
        "activation_checkpointing_offload": plugin.activation_checkpointing_offload,
    }
    for option in (option for option, is_set in unknown.items() if is_set):
        what, fix = WHAT[option]
        raise ShardingError(f"fsdp_config has {what}", fix=fix)


WHAT = {
    "version": (
        "version 1, which shards flat parameters that Mosaic cannot see",
        'leave it out, or fsdp_config={"version": 2}',
    ),
    "auto_wrap_policy": (
        "SIZE_BASED_WRAP, and what is sharded by itself is compiled so",
        "name their class: transformer_layer_cls_to_wrap, or leave both out",
    ),
    "state_dict_type": (
        "a state_dict_type whose checkpoints plain transformers cannot load",
        'fsdp_config={"state_dict_type": "FULL_STATE_DICT"}',
    ),
    "ignored_modules": (
        "ignored_modules, of which nobody would average the gradients",
        "leave it out",
    ),
    "activation_checkpointing_offload": (
        "activation_checkpointing_offload, which wraps what is compiled",
        "leave it out, and train inside of torch.autograd.graph.save_on_cpu",
    ),
}
