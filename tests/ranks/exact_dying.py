"""More of ``exact_cases``: programs that died inside of torch or of Mosaic, or ran unsharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exact_cases import PROGRAMS, Function, Program, X, add, add_model, attended, randn, sdpa
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mosaic

__all__ = ["PROGRAMS", "Program"]


def broadcast(x: Tensor) -> Any:
    y = attended(x)
    _, same = torch.broadcast_tensors(y, y)
    return same.unflatten(-1, (2, 4)).sin(), y


def one_hot(x: Tensor, ids: Tensor) -> Tensor:
    return attended(x) @ F.one_hot(ids, 8).double()[0, :8].mT


def checkpointed_columns(x: Tensor) -> Tensor:
    def columns(y: Tensor) -> Tensor:
        return attended(y.transpose(1, 2))

    return checkpoint(columns, attended(x), use_reentrant=False)


@torch.compiler.nested_compile_region
def region(x: Tensor, w: Tensor) -> Tensor:
    return attended(x @ w).sin()


def booleans_compared(x: Tensor) -> Tensor:
    i = torch.arange(7)
    return sdpa(x, x, x, (i[:, None] >= i) == (i < 5))


def booleans_added(x: Tensor) -> Tensor:
    i = torch.arange(7)
    return sdpa(x, x, x, ((i > 2) + (i > 3))[:, None] >= ((i > 2) + (i > 3)))


def long_recipe(x: Tensor, z: Tensor) -> Tensor:
    """300 ops on a whole input: more than Python calls inside of each other."""
    for step in range(300):
        z = z * 0.99 + step / 300
    return attended(x) + z


def long_accumulation(x: Tensor, z: Tensor) -> Tensor:
    total = z
    for step in range(150):
        total = z.sin() * step + total
    return attended(x) * total


def deep_mask(x: Tensor, w: Tensor) -> Tensor:
    """A bias that 280 layers make."""
    bias = x @ x.mT
    for step in range(280):
        bias = bias + ((bias @ w).tanh() if step % 2 else bias.sin()) * 0.01
    return sdpa(x, x, x, bias)


def long_scores(x: Tensor) -> Tensor:
    y = attended(x)
    for _ in range(280):
        y = y + y.tanh() * 0.01
    return y.softmax(-1) @ x.mT


class Table(nn.Module):
    """Whose argument is called x."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class Named(nn.Module):
    """A named axis that its first op gathers, and a submodule whose argument has its name."""

    def __init__(self, stem: bool):
        super().__init__()
        self.stem = nn.Conv1d(8, 8, 3, padding=1, groups=2).double() if stem else None
        self.part = Table(broken)
        self.is_broken = not stem

    def forward(self, x: Tensor) -> Tensor:
        y = attended(x if self.stem is None else self.stem(x.mT).mT.flip(1).contiguous())
        return self.part(y) if self.is_broken else y


def broken(x: Tensor) -> Tensor:
    z = x.cos()
    torch._dynamo.graph_break()
    return z.sin()


ROWS = mosaic.ShardingSpec(inputs={"x": "b n e"}, axes={"n": "ring"})
TABLE = mosaic.ShardingSpec(inputs={"x": "b n c e"}, axes={"n": "ring"})

add("broadcast_tensors, a list", broadcast, X)
add("a loss that broadcasts", lambda x, w: F.mse_loss(F.linear(attended(x), w), x), X, (8, 8))
add("one_hot, a check", one_hot, X, lambda: torch.randint(0, 8, (2, 8)))
add_model(
    "checkpoint around another axis",
    lambda: Table(checkpointed_columns),
    lambda: (randn(2, 7, 3, 8),),
    spec=TABLE,
)
add("a nested region, twice", lambda x, w: region(region(x, w), w.cos()), X, (8, 8))
add("inverse, a check", lambda x, w: attended(x) @ torch.linalg.inv(w), X, (8, 8))
add("solve of what is cut", lambda x, w: torch.linalg.solve(w, attended(x).mT), X, (8, 8))
add("group_norm of a transposed", lambda x: F.group_norm(attended(x).mT, 2), X)
add("a mask that compares booleans", booleans_compared, X)
add("a mask that adds booleans", booleans_added, X)
add("output_size", lambda x: attended(x).repeat_interleave(2, 1, output_size=14), X)
add("output_size, another dim", lambda x: attended(x).repeat_interleave(2, 2, output_size=16), X)
add("a long recipe", long_recipe, X, X)
add("a long accumulation", long_accumulation, X, X)
add("a deep mask", deep_mask, X, (7, 7))
add("a long way to a softmax", long_scores, X)
add("a product with itself over the axis", lambda x: attended(x) @ attended(x).mT, X)
add_model("a named axis behind a gather", lambda: Named(True), lambda: (randn(*X),), spec=ROWS)
add_model("a break where x is another's", lambda: Named(False), lambda: (randn(*X),), spec=ROWS)
add_model(
    "spectral norm",
    lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8).double()), Function(attended)
    ),
    lambda: (randn(*X),),
)
