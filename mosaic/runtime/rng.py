"""Dropout masks that do not depend on how a tensor is cut.

Whether an element is kept is a function of (seed, site, its global index): a hash, and no
generator's state. So p ranks draw bit for bit what one rank draws, in recomputation too, and an
attention draws tile by tile. The hash is the finaliser of splitmix64 (Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", 2014), once for each dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosaic.layout import Shard
from mosaic.runtime.comm import broadcast

_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 31


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical right shift: int64's ``>>`` copies the sign, so cut that off."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def global_indices(shard: Shard, device: torch.device) -> Tensor:
    """The global index of every local element of a dim: int64, (outer * length * inner,)."""
    place = shard.place
    intervals = place.layout.ranks[shard.rank] or ((0, 0),)
    parts = [torch.arange(a, b, dtype=torch.int64, device=device) for a, b in intervals]
    axis = parts[0] if len(parts) == 1 else torch.cat(parts)
    if place.outer == place.inner == 1:
        return axis
    outer = torch.arange(place.outer, dtype=torch.int64, device=device)
    inner = torch.arange(place.inner, dtype=torch.int64, device=device)
    blocks = outer[:, None, None] * place.layout.n + axis[None, :, None]
    return (blocks * place.inner + inner).reshape(-1)


def random_bits(seed: Tensor, site: int, indices: Sequence[Tensor]) -> Tensor:
    """31 random bits, int64, for each element of the outer product of ``indices``.

    Each dim's index goes into the hash by xor, not as one number sum(index * stride): a linear
    index of an attention passes 2**31, where Inductor may compute it in int32.
    """
    z = _mixed(seed + _signed((site + 1) * _GOLDEN))
    for dim, index in enumerate(indices):
        behind = len(indices) - dim - 1
        z = _mixed(z ^ index.reshape([-1] + [1] * behind))
    return _shifted(z, 64 - _BITS)


def uniform_keep(
    seed: Tensor, site: int, indices: Sequence[Tensor], p: float, dtype: torch.dtype
) -> Tensor:
    """A dropout mask: 0 with probability p, else 1 / (1 - p).

    ``seed``: int64 scalar tensor. ``site``: which dropout of the program. ``indices``: for each
    dim the global indices of its elements, an int64 vector.
    """
    kept = random_bits(seed, site, indices) >= round(p * (1 << _BITS))
    return kept.to(dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0)


def draw_seed(group: str, device: str) -> Tensor:
    """An int64 seed from rank 0's default generator, the same on every rank of the group."""
    seed = torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)
    return broadcast(seed, group) if group else seed
