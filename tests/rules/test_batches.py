"""Batches that are too many for one call of a kernel: the same numbers, in several calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosaic.attention import kernels
from mosaic.attention.kernels.batches import batches
from mosaic.attention.kernels.math import MATH

LIMIT = 7


class Fake:
    """A kernel that dies of more than seven batches, as those of a GPU do of 65,536."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def forward(self, q: Tensor, *rest: Tensor, **options):
        self.calls.append(q.shape[0])
        assert q.shape[0] <= LIMIT
        return MATH.forward(q, *rest, **options)

    def backward(self, dout: Tensor, *rest: Tensor, **options):
        self.calls.append(dout.shape[0])
        assert dout.shape[0] <= LIMIT
        return MATH.backward(dout, *rest, **options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    limited = MATH._replace(
        name="fake", forward=fake.forward, backward=fake.backward, most_batches=LIMIT
    )
    monkeypatch.setattr(kernels, "KERNELS", (limited,))
    return fake


@pytest.mark.parametrize("mask_batches", [None, 1, 0])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 14, 15, 50])
def test_parts_are_the_whole(fake: Fake, count: int, mask_batches: int | None) -> None:
    """With a mask for each batch (0), with one for all, whose gradient is a sum, and without."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(count, 2, n, 4, dtype=torch.float64) for n in (5, 6, 6, 5))
    mask = None
    if mask_batches is not None:
        mask = torch.randn(mask_batches or count, 1, 5, 6, dtype=torch.float64)
    keep = (torch.rand(count, 2, 5, 6) > 0.3).double() / 0.7
    given = {"band": (-3, 1), "mask": mask, "scale": 0.5, "keep": keep}
    given["shift"] = torch.randn(count, 1, 5, 1, dtype=torch.float64)
    out, lse = kernels.forward(q, k, v, **given)
    need = mask is not None
    got = kernels.backward(dout, q, k, v, out, lse, **given, need_dmask=need)

    want = MATH.forward(q, k, v, **given)
    torch.testing.assert_close((out, lse), want)
    grads = MATH.backward(dout, q, k, v, *want, **given, need_dmask=need)
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b)
    parts = max(1, -(-count // LIMIT))
    assert len(fake.calls) == 2 * parts and sum(fake.calls) == 2 * count


@pytest.mark.parametrize("count", [0, 1, 65535, 65536, 600000])
def test_batches_are_few_and_alike(count: int) -> None:
    parts = batches(count, 65535)
    lengths = [part.stop - part.start for part in parts]
    assert sum(lengths) == count and max(lengths) <= 65535
    assert len(parts) == max(1, -(-count // 65535)) and len(set(lengths)) <= 2
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


def test_without_a_limit_there_is_one_part() -> None:
    assert batches(600000, None) == [slice(0, 600000)]
