"""FlashAttention 4 with a mask of keys: those that are seen come first, and it reads no others.

Where all queries see the same keys, as with padding, their order does not matter. So the keys of a
batch are put in another order, their count is told to the kernel, and what they get as gradients
is put back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic.attention.kernels.flash_attn import FLASH_ATTN_4
from mosaic.attention.kernels.kernel import KEYS, MOST_BATCHES, Case, Gradients, Kernel
from mosaic.attention.merge import Partial
from mosaic.attention.structure import Structure


def order_of(mask: Structure, k: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of each batch, first those that are seen (batch, t); how many are, int32 (batch)."""
    seen = mask.keys()[:, 0, 0].expand(k.shape[0], k.shape[2])
    order = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order, seen.sum(1, dtype=torch.int32)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """(batch, heads, t, dim) with its t in this order."""
    return x.gather(2, order[:, None, :, None].expand(x.shape))


def _forward(q, k, v, *, mask, **options) -> Partial:
    order, count = order_of(mask, k)
    keys, values = (in_order(x, order) for x in (k, v))
    out, lse = FLASH_ATTN_4.forward(q, keys, values, used=count, **options)
    sees = (count > 0)[:, None, None]
    out = torch.where(sees[..., None], out, 0)
    return out, torch.where(sees, lse, float("-inf"))


def _backward(dout, q, k, v, out, lse, *, mask, **options) -> Gradients:
    order, count = order_of(mask, k)
    keys, values = (in_order(x, order) for x in (k, v))
    grads = FLASH_ATTN_4.backward(dout, q, keys, values, out, lse, used=count, **options)
    places = order.argsort(dim=1)
    return grads._replace(k=in_order(grads.k, places), v=in_order(grads.v, places))


def _fits(case: Case) -> bool:
    rest = case._replace(mask=None)
    able = case.mask == KEYS and case.capability == 9 and rest.plain
    return able and FLASH_ATTN_4.fits(rest)


#: On Hopper, where it was tried.
SEEN_FIRST = Kernel("flash_attn 4, seen keys", _fits, "none", _forward, _backward, MOST_BATCHES)
