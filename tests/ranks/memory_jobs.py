"""What one rank does in the tests of memory: a step with less kept, and what the plan counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from measure import held_by
from models.gpt import GPT
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mosaic

aten = torch.ops.aten
SPEC = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
KINDS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
}
CONTEXTS = create_selective_checkpoint_contexts


def keep_attention(about: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """As users write it: by the names of ATen's attentions."""
    return CheckpointPolicy.MUST_SAVE if op in KINDS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_nothing(about: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, **how: Any):
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False, **self.how)
        return out


def budget(share: float) -> AbstractContextManager[Any]:
    return functorch_config.patch(activation_memory_budget=share)


#: What is around a step, and what blocks' checkpoints are given; None: they have none.
WAYS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any] | None]] = {
    "all": (nullcontext, None),
    "checkpoint": (nullcontext, {}),
    "budget 0.5": (partial(budget, 0.5), None),
    "budget 0": (partial(budget, 0.0), None),
    "budget 0.5, checkpoint": (partial(budget, 0.5), {}),
    "save_on_cpu": (torch.autograd.graph.save_on_cpu, None),
    "save_on_cpu, pinned": (partial(torch.autograd.graph.save_on_cpu, True), None),
    "attention": (nullcontext, {"context_fn": partial(CONTEXTS, keep_attention)}),
    "nothing": (nullcontext, {"context_fn": partial(CONTEXTS, keep_nothing)}),
}


def new_gpt(way: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model: Any = GPT(vocab=31, context=64, embed=32, heads=4, layers=2).double()
    ids = torch.randint(31, (2, 61), generator=torch.Generator().manual_seed(1))
    how = WAYS[way][1]
    if how is not None:
        model.blocks = nn.ModuleList(Checkpointed(block, **how) for block in model.blocks)
    return model, ids


class Seen(TorchDispatchMode):
    """The attentions and collectives that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sends = func.namespace == "_c10d_functional" and func._opname != "wait_tensor"
        if sends or "scaled_dot_product" in func._opname:
            self.ops.append(func._opname)
        return func(*args, **(kwargs or {}))


def stepped(p: int | None, way: str) -> dict[str, Any]:
    """Loss, gradients, and the attentions and collectives of forward and of backward."""
    model, ids = new_gpt(way)
    called: Any = model
    if p is not None:
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"spec": SPEC, "inner": "eager"})
    with WAYS[way][0](), Seen() as forward:
        loss = called(ids, ids)[1]
    with Seen() as backward:
        loss.backward()
    return {
        "loss": loss.item(),
        "gradients": {n.replace("block.", ""): w.grad for n, w in model.named_parameters()},
        "forward": forward.ops,
        "backward": backward.ops,
    }


def counted_and_held(p: int, way: str) -> tuple[int, int, int]:
    """Bytes between forward and backward: of the plan before anything ran, of that which was then
    compiled, and of what autograd saved and the model gave back."""
    model, ids = new_gpt(way)
    mosaic.init(sp_size=p)
    called = torch.compile(model, backend="mosaic", options={"spec": SPEC, "inner": "eager"})
    storages: dict[int, int] = {}
    alive = []

    def note(x: Tensor) -> Tensor:
        alive.append(x)
        storages.update({one.data_ptr(): one.nbytes() for one in held_by(x)})
        return x

    with WAYS[way][0]():
        planned = mosaic.explain(model, ids, ids, spec=SPEC)
        with torch.autograd.graph.saved_tensors_hooks(note, note), mosaic.plans() as plans:
            result = called(ids, ids)
    for x in result:
        note(x.detach())
    given = {
        one.data_ptr() for x in [*model.parameters(), *model.buffers(), ids] for one in held_by(x)
    }
    held = sum(n for where, n in storages.items() if where not in given)
    return planned.memory().kept, plans[0].memory().kept, held
