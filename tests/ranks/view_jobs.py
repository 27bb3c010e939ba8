"""Programs that write into tensors which share memory: what is written to one, all have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mosaic


def a_row(x: Tensor) -> Tensor:
    v = x[:, 3]
    v += 1
    return x


def a_row_of_a_row(x: Tensor) -> Tensor:
    x[:, 3][2][1:3].mul_(5)
    return x


def a_view_reads_what_its_base_got(x: Tensor) -> Tensor:
    slab, row = x[:, 2:5], x[:, 3]
    x.mul_(3)
    return slab * row.unsqueeze(1)


def a_view_reads_what_another_got(x: Tensor) -> Tensor:
    a, b = x[:, :4], x[:, 2:]
    a += 1
    return b * b


def a_chain(x: Tensor) -> Tensor:
    x.transpose(0, 1)[2:5].unsqueeze(0)[..., 1] = 7
    return x


def by_index(x: Tensor) -> Tensor:
    x[1, 2:4] = x[0, 0:2] * 5
    x[..., -1] += 3
    x[:, 2:][:, [0, 3]] = 1.0
    return x


def every_other(x: Tensor) -> Tensor:
    x[:, ::2] = 1.5
    x[0::3] *= 2
    return x


def reshaped(x: Tensor) -> Tensor:
    x.view(4, 42)[1:3].mul_(2)
    x.flatten(0, 1).view(4, 7, 2, 3)[..., 0].zero_()
    return x


def permuted(x: Tensor) -> Tensor:
    x.permute(2, 0, 1)[:, :, 1:].div_(2)
    x.squeeze()[:, 4:5].squeeze(1).exp_()
    return x


def masked(x: Tensor) -> Tensor:
    x[:, 2:].masked_fill_(x[:, 2:] > 0, 0.25)
    return x


def into_zeros(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :3] = x[:, 4:]
    y[:, 4] = x[:, 0]
    return y


def complex_numbers(x: Tensor) -> Tensor:
    y = torch.view_as_complex(x.view(4, 7, 3, 2))
    torch.view_as_real(y)[:, 2:4, :, 0] = 1
    return torch.view_as_real(y)


def diagonal(x: Tensor) -> Tensor:
    torch.diagonal(x, 0, 0, 1).mul_(2)
    return x


def another_look(x: Tensor) -> Tensor:
    v = x[:, 1:4]
    v.unsqueeze_(0)
    v += 1
    return x


def split(x: Tensor) -> Tensor:
    a, b = x.split([3, 4], 1)
    a.mul_(2)
    b.add_(a.sum())
    return x


def unbind(x: Tensor) -> Tensor:
    rows = x.unbind(1)
    rows[5].copy_(rows[1])
    return x


def chunk(x: Tensor) -> Tensor:
    _, b, c = x.chunk(3, -1)
    b *= c
    return x


def under_no_grad(x: Tensor) -> Tensor:
    y = x * 3
    with torch.no_grad():
        y[:, 2:4] = 1.0
        y.mul_(2)
    return y * x


def detached(x: Tensor) -> Tensor:
    y, w = x * 3, x.sin()
    y.detach()[:, 3] = 1.0
    w.view(4, 42).data.mul_(5)
    return y * w


PROGRAMS: tuple[Callable[[Tensor], Tensor], ...] = (
    a_row, a_row_of_a_row, a_view_reads_what_its_base_got, a_view_reads_what_another_got, a_chain,
    by_index, every_other, reshaped, permuted, masked, into_zeros, complex_numbers, diagonal,
    another_look, under_no_grad, detached,
)  # fmt: skip
#: Torch refuses these where a gradient is recorded.
OF_MANY = (split, unbind, chunk)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def start(p: int) -> None:
    torch._dynamo.reset()
    if p:
        mosaic.init(p)


def written(p: int, program: Any, how: str, mode: str) -> list[Tensor]:
    """What ``program`` makes of 2 x, and x's gradient. ``how``: compiled, or run op by op;
    "inside": all but the product is compiled, so that its input is written to."""
    start(p)
    x = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(mode == "grad")
    with MODES[mode]():
        y = mosaic.distribute(x, 1) if p else x
        if p and how == "compiled":
            y = compiled(lambda y: program(y * 2))(y)
        elif p and how == "inside":
            y = y * 2
            y = compiled(program)(y) * y.mean()
        else:
            z = y * 2
            y = program(z) * z.mean() if how == "inside" else program(z)
        y = y.full_tensor() if isinstance(y, mosaic.ShardedTensor) else y
        if mode == "grad":
            (y * torch.arange(y.numel()).view_as(y) / 10).sum().backward()
    return [y.detach(), *([x.grad] if mode == "grad" else [])]


def compiled(fn: Any) -> Any:
    return torch.compile(fn, backend="mosaic", options={"inner": "eager"})


def refused(p: int, program: Any) -> str:
    start(p)
    x = mosaic.distribute(torch.ones(4, 7, 6, dtype=torch.float64).requires_grad_(), 1) * 2
    try:
        program(x)
    except (mosaic.MosaicError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return str(error)
    raise AssertionError("it ran")


def expanded(x: Tensor) -> Any:
    return x.expand(2, 4, 7, 6)[0, 0].add_(1)


def two_histories(x: Tensor) -> Any:
    def both(x: Tensor) -> Tensor:
        y = x * 3
        z = y.detach()
        z.mul_(x)
        return y + z

    return compiled(both)(x)


def turned_under_a_view(x: Tensor) -> Any:
    v = x[:, 1:4]
    x.transpose_(0, 1)
    v.mul_(3)


def of_a_graph_that_shares(x: Tensor) -> Any:
    y, v = compiled(lambda x: (y := x * 2, y[:, 1:4]))(x)
    v += 1
    return y


def takes_a_history(p: int) -> list[Tensor]:
    """A compiled function writes what has a gradient into an input that had none."""
    start(p)
    x = torch.ones(4, 7, 6, dtype=torch.float64, requires_grad=True)
    given = mosaic.distribute(x, 1) if p else x
    out = torch.zeros_like(given)
    fill = (
        compiled(lambda y, x: y[1:].copy_(x[1:] * 3)) if p else lambda y, x: y[1:].copy_(x[1:] * 3)
    )
    fill(out, given)
    (out * out).sum().backward()
    return [x.grad]


def into_a_whole_view(p: int) -> float:
    """A view that is whole on every rank is compiled with, and written to there."""
    start(p)
    x = mosaic.distribute(torch.ones(4, 7, 6, dtype=torch.float64), 1) * 2
    out = compiled(lambda row: row.add_(1).unsqueeze(1) * 2)(x[:, 3])
    off = x.full_tensor()[:, 3] - 3
    return float(off.abs().max() + (out - 6).abs().max())
