"""What is refused of ``torch.vmap`` and its relatives: whole messages."""

from __future__ import annotations

import re
from collections.abc import Callable

import contract_cases as cc
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._C import _functorch as functorch

import mosaic

X = torch.randn(2, 13, cc.E)


def refusal(change: Callable[[Tensor], Tensor]) -> str:
    attention = cc.Attention()
    with pytest.raises(Exception) as caught:
        mosaic.explain(lambda x: attention(change(x)), X, sp_size=2)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, mosaic.MosaicError), error
    assert functorch.get_dynamic_layer_stack_depth() == 0
    return re.sub(r"\.py:\d+ in", ".py:LINE in", str(error))


def constant(row: Tensor) -> Tensor:
    with torch.no_grad():
        return row * 2


def rounded(row: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return row @ row.T @ row


def cubes(x: Tensor) -> Tensor:
    return x.pow(3).sum()


def noisy(x: Tensor) -> Tensor:
    return torch.vmap(torch.dropout, (0, None, None), randomness="same")(x, 0.5, True)


def of_cubes(x: Tensor) -> Tensor:
    return torch.func.grad(cubes)(x)


def of_each_cube(x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(cubes))(x)


def test_random_numbers() -> None:
    assert_expected_inline(
        refusal(noisy),
        """\
torch.vmap with randomness='same'
  tests/errors/test_vmap.py:LINE in noisy
    return torch.vmap(torch.dropout, (0, None, None), randomness="same")(x, 0.5, True)
  fix  do it outside of the compiled function, or with dims that broadcast""",
    )


def test_no_grad() -> None:
    assert_expected_inline(
        refusal(torch.vmap(constant)),
        """\
a change between no_grad and enable_grad inside of torch.vmap
  tests/errors/test_vmap.py:LINE in constant
    return row * 2
  fix  do it outside of the compiled function, or with dims that broadcast""",
    )


def test_autocast() -> None:
    assert_expected_inline(
        refusal(torch.vmap(rounded)),
        """\
torch.autocast inside of torch.vmap
  tests/errors/test_vmap.py:LINE in rounded
    return row @ row.T @ row
  fix  do it outside of the compiled function, or with dims that broadcast""",
    )


def test_another_transform() -> None:
    assert_expected_inline(
        refusal(of_cubes),
        """\
a transform of torch.func other than vmap
  tests/errors/test_vmap.py:LINE in of_cubes
    return torch.func.grad(cubes)(x)
  fix  do it outside of the compiled function, or with dims that broadcast""",
    )


def test_another_transform_inside() -> None:
    assert_expected_inline(
        refusal(of_each_cube),
        """\
a transform of torch.func other than vmap
  tests/errors/test_vmap.py:LINE in of_each_cube
    return torch.vmap(torch.func.grad(cubes))(x)
  fix  do it outside of the compiled function, or with dims that broadcast""",
    )
