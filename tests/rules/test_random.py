"""Dropout masks: the same for every cut, eager and compiled, and random enough."""

from __future__ import annotations

import pytest
import torch

from mosaic.layout import Layout, Place, Shard
from mosaic.runtime.rng import global_indices, random_bits, uniform_keep

CPU = torch.device("cpu")
SIZES = (2, 3, 24, 31)


def whole() -> list[torch.Tensor]:
    return [torch.arange(size) for size in SIZES]


def seed(value: int = 7) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize("layout", [Layout.even(24, 4), Layout.zigzag(24, 3), Layout.even(24, 5)])
def test_a_cut_draws_what_the_whole_draws(layout: Layout) -> None:
    everything = uniform_keep(seed(), 3, whole(), 0.3, torch.float32)
    for rank in range(layout.p):
        mine = global_indices(Shard(Place(layout, 2), rank, ""), CPU)
        got = uniform_keep(seed(), 3, [*whole()[:2], mine, whole()[3]], 0.3, torch.float32)
        assert torch.equal(got, everything[:, :, layout.indices(rank)])


def test_global_indices_of_a_folded_dim() -> None:
    place = Place(Layout.even(5, 2), 0, outer=2, inner=3)
    dim = torch.arange(place.size).reshape(2, 5, 3)
    assert torch.equal(global_indices(Shard(place, 1, ""), CPU), dim[:, 3:].reshape(-1))


def test_compiled_draws_what_eager_draws() -> None:
    indices = [torch.arange(a, a + n) for a, n in zip((0, 5, 2**20, 2**30), SIZES, strict=True)]
    compiled = torch.compile(random_bits, fullgraph=True)
    assert torch.equal(compiled(seed(), 3, indices), random_bits(seed(), 3, indices))


def drawn(value: int, site: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (1000, 1000)."""
    indices = [torch.arange(1000), torch.arange(1000)]
    return random_bits(seed(value), site, indices).double() / 2**31


def test_uniform_and_independent() -> None:
    a = drawn(0, 0)
    assert abs(a.mean() - 0.5) < 2e-3 and abs(a.var() - 1 / 12) < 5e-4
    assert torch.histc(a, 16).std() < 4 * (1e6 / 16) ** 0.5
    shifted = [(a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, a.T), (a, drawn(0, 1)), (a, drawn(1, 0))]
    for x, y in shifted:
        assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) < 5e-3
        assert abs(((x < 0.1) & (y < 0.1)).double().mean() - 0.01) < 5e-4


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_mean_is_kept(p: float) -> None:
    keep = uniform_keep(seed(), 0, [torch.arange(500), torch.arange(500)], p, torch.float64)
    assert abs(keep.mean() - float(p < 1)) < 1e-2
    assert abs((keep == 0).double().mean() - p) < 5e-3
