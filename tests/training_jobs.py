"""What one rank does in the tests of training: steps with an optimizer, and what they keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from models.gpt import GPT
from torch import Tensor, nn

import mosaic

SPEC = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})


def new_gpt(p: int | None, **config: float) -> tuple[nn.Module, nn.Module]:
    """The model, and the same compiled for p ranks (None: left as it is)."""
    torch.manual_seed(0)
    model = GPT(vocab=31, context=256, embed=32, heads=4, layers=2, **config).double()
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
