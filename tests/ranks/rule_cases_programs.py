"""Several ops at once: layouts that differ, gradients that meet, recipes, random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_case import Cases, f, i
from torch import Tensor

from mosaic.runtime.autograd_functions import AUTOGRAD_FUNCTIONS

CASES = Cases()
add = CASES.add


class Tripled(torch.autograd.Function):
    """A backward that is not the derivative of forward: only the user's own gives this."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 3 * grad * w, 5 * (grad * x).sum(0)


def kept_whole(x: Tensor, w: Tensor) -> Tensor:
    """As capture writes it down when Dynamo finds an autograd.Function."""
    if type(x) is Tensor:
        return Tripled.apply(x, w).sin()
    number = AUTOGRAD_FUNCTIONS.add(Tripled.apply, (torch.empty(0), torch.empty(0)), {})
    return torch.ops.mosaic.autograd_function([x, w], number)[0].sin()


add("autograd function", kept_whole, f(5, 4), f(4))
add("with_history", lambda x, v: torch.ops.mosaic.with_history(x, v).sin(), f(5, 4), f(5, 4))

add("whole used twice", lambda x, w: x * w + (x @ w.unsqueeze(1)), f(5, 4), f(4))
add(
    "whole recipe",
    lambda x, w: x * (w * 2).tanh() + F.linear(x, (w * 2).tanh().unsqueeze(0)),
    f(5, 4),
    f(4),
)
add(
    "whole already written",
    lambda x, w: ((x.sum(0) * w).tanh() * x + x.sum(0), x.sum(0)),
    f(5, 4),
    f(4),
)
add("whole in parts and whole", lambda x, w: x * w + x * w.sum() + w.sum(0), f(5, 4), f(5, 4))
add(
    "whole at two places",
    lambda x, w: x * w + (x.transpose(0, 1) * w).transpose(0, 1),
    f(5, 5),
    f(5, 5),
)
add("sum used by sharded", lambda x: (x / x.sum(0)).sin() + x.mean(), f(5, 4))
add("sum used whole and sharded", lambda x, w: (x.sum(0) @ w, x * (x.sum(0) @ w)), f(5, 4), f(4, 4))
add("select used by sharded", lambda x: x * x[0] + x[-1].sin(), f(5, 4))
add("layouts of slices", lambda x, y: x[2:] * y[:-2] + x[1:-1], f(7, 2), f(7, 2))
add("layouts of cats", lambda x, y: torch.cat([x, y]) * torch.cat([y, x]), f(5, 2), f(4, 2))
add("reshard and reduce", lambda x: (x[1:] * x[:-1]).sum(0) * x.amax(0), f(7, 2))
add("matmul of two layouts", lambda x, y: x[1:].transpose(0, 1) @ y[:-1], f(7, 2), f(7, 4))
add("where of two layouts", lambda x, y: torch.where(x[1:] > 0, y[:-1], x[:-1]), f(7, 2), f(7, 2))
add("stack of two layouts", lambda x: torch.stack([x[1:], x[:-1], x[1:]], -1).sum(-1), f(7, 2))
add("two axes in one", lambda x: (x.unsqueeze(0) - x.unsqueeze(1)).abs().sum((0, 2)), f(5, 2))
add("gradient through max", lambda x: (x.amax(0) * x).sum(0) + x.amax(), f(5, 2))
add(
    "positions",
    lambda x, w: x + w[torch.arange(5)] * (torch.arange(5) % 3).unsqueeze(1),
    f(5, 2),
    f(9, 2),
)
add(
    "rotary",
    lambda x: x * torch.outer(torch.arange(5.0, dtype=torch.float64), torch.ones(2).double()).cos(),
    f(3, 5, 2),
)
add("int arithmetic", lambda x, j: x * (j.cumsum(0) % 3 + j.amax(0)), f(5, 2), i(9, 5, 2))
add("half rounded", lambda x: x.to(torch.bfloat16).sum(0).double(), f(5, 2), tol=0.05)
add("no grad", lambda x, w: (x.detach() * w).sum(0) * x, f(5, 2), f(5, 2))
add("not an output's", lambda x, w: (x * w, w * 2, w.sum()), f(5, 2), f(2))
add("dropout", lambda x: F.dropout(x, 0.4), f(2, 5, 4), random=True)
add(
    "dropout twice",
    lambda x, w: F.dropout(F.dropout(x, 0.4) * w + F.dropout(w, 0.3), 0.2),
    f(5, 4),
    f(5, 4),
    random=True,
)
add(
    "dropout after views",
    lambda x: F.dropout(x.reshape(10, 4), 0.4).repeat(2, 1),
    f(2, 5, 4),
    random=True,
)
add(
    "whole attention with dropout",
    lambda x, y: x * F.scaled_dot_product_attention(y, y, y, dropout_p=0.3).sum(0),
    f(5, 4),
    f(7, 4),
    random=True,
)
add("dropout all", lambda x: F.dropout(x, 1.0), f(5, 4), random=True)
add("dropout eval", lambda x: F.dropout(x, 0.4, training=False), f(5, 4))
add("dropout2d", lambda x: F.dropout2d(x, 0.4), f(2, 5, 4, 2), random=True)
add("alpha_dropout", lambda x: F.alpha_dropout(x, 0.4, True), f(5, 4), random=True)
add("alpha_dropout eval", lambda x: F.alpha_dropout(x, 0.4, False), f(5, 4))
add("rrelu", lambda x: F.rrelu(x, training=True), f(5, 4), random=True)
add("rrelu eval", lambda x: F.rrelu(x), f(5, 4))
add(
    "lstm",
    lambda x, h, *w: torch.lstm(x, (h, h), w, False, 1, 0.0, False, False, True),
    f(2, 5, 3),
    f(1, 2, 4),
    f(16, 3),
    f(16, 4),
    pairs=False,
)
add("multinomial", lambda x: x * torch.multinomial(x.softmax(-1), 4), f(5, 4), random=True)
add("rand_like", lambda x: x * torch.rand_like(x), f(5, 4), random=True)
add(
    "randn",
    lambda x: x * torch.randn(4, dtype=x.dtype) + torch.randn(5, 1, dtype=x.dtype),
    f(5, 4),
    random=True,
)
add("bernoulli", lambda x: x * torch.bernoulli(x.sigmoid()), f(5, 4), random=True)
