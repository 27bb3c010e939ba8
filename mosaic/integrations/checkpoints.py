"""Checkpoints of a model whose parameters FSDP2 has cut: those that it has without FSDP2."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from mosaic.torch_private import pytree


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A model's state on rank 0; all ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def load_whole(model: nn.Module) -> None:
    """Let the model's ``load_state_dict`` take whole tensors: each rank keeps its part."""
    model.register_load_state_dict_pre_hook(cut_as_parameters)


def cut_as_parameters(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in model.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if name in state:
            state[name] = cut_as(parameter, state[name])


class WholeOptimizer:
    """An optimizer as it is saved and loaded: its ``state_dict``, which all ranks must call, is
    whole on rank 0."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        is_first = dist.get_rank() == 0

        def joined(x: DTensor) -> Tensor | None:
            whole = x.full_tensor()
            return whole.cpu() if is_first else None

        return pytree.tree_map_only(DTensor, joined, self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [x for group in self.optimizer.param_groups for x in group["params"]]
        cut = {
            number: {name: cut_as(parameters[number], x) for name, x in held.items()}
            for number, held in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": cut})


def cut_as(parameter: Tensor, x: Any) -> Any:
    """What is of a parameter's shape (its value, a mean of its gradients), cut as that is."""
    is_its_own = isinstance(x, Tensor) and x.shape == parameter.shape
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor) or not is_its_own:
        return x
    mesh = parameter.device_mesh
    return distribute_tensor(x.to(parameter.device), mesh, parameter.placements, src_data_rank=None)
