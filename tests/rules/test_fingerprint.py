"""Every bit of a tensor and its place are in its fingerprint, and no more memory than a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic.frontend.data_check import read, written
from mosaic.runtime import fingerprint as module
from mosaic.runtime.fingerprint import fingerprint

DTYPES = (
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
)  # fmt: skip


def tensor(dtype: torch.dtype, n: int = 60) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(n) * 9).to(dtype)


def flipped(x: Tensor, place: int, bit: int) -> Tensor:
    """One bit of one byte is another."""
    x = x.clone()
    x.view(torch.uint8)[place] ^= 1 << bit
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    x = tensor(dtype)
    prints = {int(fingerprint(x))}
    size = x.element_size()
    changed = [flipped(x, byte, bit) for byte in range(0, 20 * size, 3) for bit in range(8)]
    prints |= {int(fingerprint(y)) for y in changed}
    assert len(prints) == len(changed) + 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_places_count(dtype: torch.dtype) -> None:
    """Two elements change places; their signs do, which in float64 is the highest bit alone."""
    x = torch.arange(1, 61).to(dtype)
    orders = [torch.arange(60) for _ in range(30)]
    for i, order in enumerate(orders):
        order[[i, i + 7]] = order[[i + 7, i]]
    signs = [x * torch.where((torch.arange(60) % 30) == i, -1, 1).to(dtype) for i in range(30)]
    others = [x[order] for order in orders] + signs + [x.roll(1), x.flip(0)]
    assert len({int(fingerprint(y)) for y in (x, *others)}) == len(others) + 1


def test_nan_is_equal_to_itself() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -0.0])
    assert int(fingerprint(x)) == int(fingerprint(x.clone()))
    assert int(fingerprint(x)) != int(fingerprint(torch.nan_to_num(x)))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_neither_chunks_nor_strides_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    x = torch.randn(5, 6, 4)
    views = [x, x.mT, x[:, ::2], x[None, :, 1:], x.permute(2, 0, 1), x[..., 0], x[0, 0, 0]]
    want = [int(fingerprint(y.contiguous())) for y in views]
    monkeypatch.setattr(module, "CHUNK", {"cpu": chunk})
    assert [int(fingerprint(y)) for y in views] == want


def test_views_of_complex_numbers() -> None:
    x = torch.randn(9, dtype=torch.complex64)
    assert int(fingerprint(x.conj())) == int(fingerprint(x.conj().resolve_conj()))
    assert int(fingerprint(x.conj().imag)) == int(fingerprint(-x.imag))


class Largest(TorchDispatchMode):
    """Notes how many bytes were made at once."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None and not func.is_view:
            self.made = max(self.made, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("x", [torch.ones(100, 100), torch.ones(100, 100).t()], ids=["", "t"])
def test_the_buffer_is_fixed(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    monkeypatch.setattr(module, "CHUNK", {"cpu": 128})
    with Largest() as largest:
        fingerprint(x)
    assert 0 < largest.made <= 128 * 8


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12))
def test_sizes_are_read_as_written(shapes: list[list[int]]) -> None:
    """As far as there is room."""
    found = read(written(shapes))
    assert found == shapes[: len(found)] and len(written(shapes)) == 31
    assert found == shapes or sum(len(s) + 1 for s in shapes[: len(found) + 1]) > 31
