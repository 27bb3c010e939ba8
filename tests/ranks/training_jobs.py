"""What one rank does in the tests of training: steps with an optimizer, and what they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from models.gpt import GPT
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mosaic
from mosaic.frontend import backend

aten = torch.ops.aten

SPEC = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})


def new_gpt(p: int | None, **config: float) -> tuple[nn.Module, nn.Module]:
    """The model, and the same compiled for p ranks (None: left as it is)."""
    torch.manual_seed(0)
    model = GPT(**{"vocab": 31, "context": 256, "embed": 32, "heads": 4, "layers": 2} | config)
    model = model.double()
    if p is None:
        return model, model
    mosaic.init(sp_size=p)
    options = {"spec": SPEC, "inner": "eager"}
    return model, torch.compile(model, backend="mosaic", options=options)


def train(p: int | None, steps: int, length: int = 61, **config: float) -> dict[str, list]:
    """The loss of every step of AdamW, and the gradients of the first and the last."""
    model, called = new_gpt(p, **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(31, (4, 3, length), generator=draw)
    torch.manual_seed(2)  # of dropout
    losses, gradients = [], []
    for step in range(steps):
        ids = texts[step % len(texts)]
        loss = called(ids, ids)[1]
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step in (0, steps - 1):
            gradients.append({n: w.grad.clone() for n, w in model.named_parameters()})
        optimizer.step()
    return {"losses": losses, "gradients": gradients}


def kept_bytes(p: int) -> int:
    """Bytes of activations that the compiled graph keeps for backward."""
    model, called = new_gpt(p)
    ids = torch.randint(31, (2, 256))
    loss = called(ids, ids)[1]
    given = {address(x) for x in [*model.parameters(), ids]}
    kept = {address(x): x.untyped_storage().nbytes() for x in saved_tensors(loss)}
    return sum(n for where, n in kept.items() if where not in given)


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def saved_tensors(out: Tensor) -> Iterator[Tensor]:
    """Of every compiled function behind ``out``."""
    todo, seen = [out.grad_fn], set()
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if "CompiledFunction" in function.name():
            yield from (x for x in function.saved_tensors if x is not None)
        todo += [behind for behind, _ in function.next_functions]


class Selective(nn.Module):
    """A block in a selective checkpoint, whose policy decides about products."""

    def __init__(self, policy: Callable[..., CheckpointPolicy]):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.context_fn = partial(create_selective_checkpoint_contexts, policy)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, context_fn=self.context_fn)

    def block(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        return x + self.down(F.gelu(self.up(y).sin()))


def first_product(about: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """A policy that counts, as torchtitan's does: keeps every second product, from the first."""
    if op != aten.addmm.default:
        return CheckpointPolicy.PREFER_RECOMPUTE
    PRODUCTS.append(op)
    return CheckpointPolicy.MUST_SAVE if len(PRODUCTS) % 2 else CheckpointPolicy.PREFER_RECOMPUTE


def save_nothing(about: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


PRODUCTS: list[object] = []


def products_in_backward(p: int | None, policy: Callable[..., CheckpointPolicy]) -> dict:
    """Gradients, and how many products with addition backward runs again."""
    torch.manual_seed(0)
    model, x = Selective(policy).double(), torch.randn(2, 13, 8).double()
    PRODUCTS.clear()
    plans: list[mosaic.Plan] = []
    called = model
    if p is not None:
        mosaic.init(sp_size=p)
        backend.LISTENERS[:] = [plans.append]
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    called(x).square().sum().backward()
    backend.LISTENERS.clear()
    again = [n for plan in plans for n in plan.graphs["backward"].nodes]
    return {
        "gradients": {n: w.grad for n, w in model.named_parameters()},
        "again": sum(node.target == aten.addmm.default for node in again),
    }
