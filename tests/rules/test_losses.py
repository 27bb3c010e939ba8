"""The op of a head and its loss, against the two ops that it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import metrics

from mosaic.losses import blocks
from mosaic.losses.op import TOKEN_LOSSES
from mosaic.losses.steps import Step, decode, encode

CLASSES, DIM = 23, 8
CAP = "to float32; div 3.0; tanh; mul 3.0"


def plain(hidden, head, bias, target, weight, steps: str, smoothing: float) -> Tensor:
    logits = F.linear(hidden, head, bias)
    for step in decode(steps):
        logits = step(logits)
    options = {"ignore_index": -100, "reduction": "none", "label_smoothing": smoothing}
    return F.cross_entropy(logits, target, weight, **options)


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "LARGEST", 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_linear_and_cross_entropy(few, dtype: torch.dtype) -> None:
    every = itertools.product((False, True), (False, True), (0.0, 0.1), ("", CAP), (0, 1, 13))
    for has_bias, has_weight, smoothing, steps, tokens in every:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, DIM, dtype=dtype, requires_grad=True)
        head = torch.randn(CLASSES, DIM, dtype=dtype, requires_grad=True)
        bias = torch.randn(CLASSES, dtype=dtype, requires_grad=True) if has_bias else None
        target = torch.randint(0, CLASSES, (tokens,))
        target[::4] = -100
        kind = torch.float32 if steps else dtype
        weight = torch.rand(CLASSES, dtype=kind) if has_weight else None
        given = (hidden, head, bias, target, weight, steps)
        want = plain(*given, smoothing)
        got, _ = TOKEN_LOSSES(*given, -100, smoothing)
        dout = torch.randn(tokens, dtype=want.dtype)
        inputs = [x for x in (hidden, head, bias) if x is not None]
        found = torch.autograd.grad(got, inputs, dout.to(got.dtype))
        wanted = torch.autograd.grad(want, inputs, dout)
        tol = 2e-2 if dtype == torch.bfloat16 else 1e-5 if steps else 1e-12
        for a, b in zip((got, *found), (want, *wanted), strict=True):
            assert (a - b).norm() <= tol * (b.norm() + 1e-3), given


def test_of_hidden_states_alone(few) -> None:
    """A head that is not learned gets no gradient, and its products are not made."""
    hidden = torch.randn(5, DIM, requires_grad=True)
    loss, _ = TOKEN_LOSSES(
        hidden, torch.randn(CLASSES, DIM), None, torch.arange(5), None, "", -100, 0.0
    )
    loss.sum().backward()
    assert hidden.grad is not None


def test_what_torch_asks_of_an_op() -> None:
    hidden = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    head = torch.randn(CLASSES, DIM, dtype=torch.float64, requires_grad=True)
    args = (hidden, head, None, torch.arange(5), None, "tanh", 2, 0.1)
    torch.library.opcheck(TOKEN_LOSSES, args)


@pytest.mark.parametrize("length, other", [(16384, 128256), (128256, 131072), (7, 2**30), (0, 5)])
def test_blocks_are_few_and_small(length: int, other: int) -> None:
    parts = [*blocks.blocks(length, other)]
    assert [i for part in parts for i in (part.start, part.stop)] == [
        i for n, part in enumerate(parts) for i in (parts[n - 1].stop if n else 0, part.stop)
    ]
    assert (parts[-1].stop if parts else 0) == length
    assert len(parts) <= blocks.MOST
    most = max((part.stop - part.start for part in parts), default=0)
    assert most * other <= max(blocks.LARGEST, -(-length * other // blocks.MOST)) or most == 1


def test_one_kernel_is_between_the_products() -> None:
    metrics.reset()
    torch._dynamo.reset()
    rows = blocks.Rows(torch.arange(16), torch.zeros(16), torch.ones(16))
    how, columns = blocks.How(CAP, -100, 0.1), torch.arange(32)
    given = (torch.randn(16, 32), columns, rows, None, torch.ones(()), how, 32)
    got = torch.compile(blocks.dlogits_of)(*given)
    assert metrics.generated_kernel_count == 1
    assert torch.allclose(got, blocks.dlogits_of(*given), atol=1e-6)


def test_steps_are_text() -> None:
    steps = (Step("to", "float32"), Step("tanh"), Step("mul", "30.0"))
    assert encode(steps) == "to float32; tanh; mul 30.0"
    assert decode(encode(steps)) == steps
    assert decode("") == ()
