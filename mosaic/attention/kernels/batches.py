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
    found: list[Gradients] = [
        kernel.backward(*(x[part] for x in tensors), **options_of(options, part)) for part in parts
    ]
    dq, dk, dv, dmasks, dleaves = zip(*found, strict=True)
    grads = Gradients(torch.cat(dq), torch.cat(dk), torch.cat(dv))
    if dmasks[0] is not None:
        grads = grads._replace(mask=of_all(dmasks, options["mask"]))
    if not dleaves[0]:
        return grads
    scores: Structure = options["scores"]
    learned = [scores.leaves[i] for i in scores.parsed.learned]
    leaves = (of_all(x, leaf) for x, leaf in zip(zip(*dleaves, strict=True), learned, strict=True))
    return grads._replace(leaves=tuple(leaves))


def of_all(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The gradient of what some have of it: batches side by side, or what they have in common."""
    has_batches = like.ndim == 4 and like.shape[0] > 1
    return torch.cat(parts) if has_batches else torch.stack(parts).sum(0)


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
