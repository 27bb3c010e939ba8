"""Batches that are too many for one call of a kernel go in several calls, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaic.attention.kernels.kernel import Gradients, Kernel
from mosaic.attention.merge import Partial
from mosaic.attention.structure import Structure


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Partial:
    """``kernel.forward``, of at most ``kernel.most_batches`` at once."""
    parts = batches(q.shape[0], kernel.most_batches)
    if len(parts) == 1:
        return kernel.forward(q, k, v, **options)
    found = [
        kernel.forward(q[part], k[part], v[part], **options_of(options, part)) for part in parts
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def backward(kernel: Kernel, tensors: tuple[Tensor, ...], **options: Any) -> Gradients:
    """``kernel.backward`` of (dout, q, k, v, out, lse), of at most ``kernel.most_batches`` at once.

    The gradient of a mask that all batches have in common is the sum of theirs.
    """
    parts = batches(tensors[0].shape[0], kernel.most_batches)
    if len(parts) == 1:
        return kernel.backward(*tensors, **options)
    found = [
        kernel.backward(*(x[part] for x in tensors), **options_of(options, part)) for part in parts
    ]
    *grads, dmasks = zip(*found, strict=True)
    dq, dk, dv = (torch.cat(same) for same in grads)
    if dmasks[0] is None:
        return dq, dk, dv, None
    return dq, dk, dv, sum(dmasks) if options["mask"].shape[0] == 1 else torch.cat(dmasks)


def batches(count: int, most: int | None) -> list[slice]:
    """As few parts as may be, of equal lengths but for the last ones: cuDNN plans for each length.

    >>> batches(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    if most is None or count <= most:
        return [slice(0, count)]
    length = -(-count // -(-count // most))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def options_of(options: dict[str, Any], part: slice) -> dict[str, Any]:
    """The options of some batches: tensors are (batch|1, ...)."""

    def of(x: Any) -> Any:
        if isinstance(x, Structure):
            return x.of_batches(part)
        return x[part] if isinstance(x, Tensor) and x.shape[0] > 1 else x

    return {name: of(x) for name, x in options.items()}
