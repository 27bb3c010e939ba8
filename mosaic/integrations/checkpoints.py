"""Checkpoints of a model whose parameters FSDP2 has cut: whole files, which transformers reads."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A model's state on rank 0; all ranks must call it."""
    return get_model_state_dict(model, options=WHOLE)


class WholeOptimizer:
    """An optimizer's state as it is saved and loaded: whole, by the names of parameters. All ranks
    must make one, and call ``load_state_dict``."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.model, self.optimizer = model, optimizer
        self.state = get_optimizer_state_dict(model, optimizer, options=WHOLE)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)


def load_whole(model: nn.Module) -> None:
    """Let the model's ``load_state_dict`` take whole tensors: each rank keeps its part."""
    model.register_load_state_dict_pre_hook(cut_as_parameters)


def cut_as_parameters(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in model.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        x = state.get(name)
        if isinstance(parameter, DTensor) and x is not None and not isinstance(x, DTensor):
            mesh, x = parameter.device_mesh, x.to(parameter.device)
            state[name] = distribute_tensor(x, mesh, parameter.placements, src_data_rank=None)
