"""Attentions written by hand: the same function, with all its gradients, as one node."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from handwritten import ATTENTIONS, INF, OTHERS, N, Program
from mask_programs import is_float, traced
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import mosaic
from mosaic.graph.modes import Modes
from mosaic.masks.op import STRUCTURED
from mosaic.masks.softmax import SOFTMAX
from mosaic.passes.analyze_masks import analyze_masks
from mosaic.passes.normalize import drop_assertions
from mosaic.passes.raise_attention import raise_attention


def given() -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, N, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return [q, k, v, torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1], [1] * N], dtype=torch.bool)]


def raised(program: Program, inputs: list[Tensor]) -> tuple[fx.GraphModule, int]:
    module = traced(program, *inputs)
    drop_assertions(module.graph)
    count = raise_attention(module.graph, SimpleNamespace())
    module.graph.lint()
    module.recompile()
    return module, count


@pytest.mark.parametrize("name", ATTENTIONS)
def test_is_one_attention(name: str) -> None:
    inputs = given()
    module, count = raised(ATTENTIONS[name], inputs)
    targets = [node.target for node in module.graph.nodes]
    assert count == 1
    assert name == "weights_read_twice" or not set(targets).intersection(SOFTMAX)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention forgets how many keys a hidden row has
        found = with_gradients(lambda *xs: module(*xs)[0], inputs)
    for ours, expected in zip(found, with_gradients(ATTENTIONS[name], inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def with_gradients(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    out = program(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs[:3])]


@pytest.mark.parametrize("name", OTHERS)
def test_stays_what_it_is(name: str) -> None:
    assert raised(OTHERS[name], given())[1] == 0


def test_scores_in_float32_of_halves() -> None:
    """Where nothing is added to them that halves would round."""

    def program(q, k, v, pad):
        q, k, v = (x.bfloat16() for x in (q, k, v))
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * 0.5
        scores = scores.masked_fill(torch.ones(N, N).tril() == 0, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1).to(v.dtype) @ v).double()

    inputs = given()
    module, count = raised(program, inputs)
    assert count == 1
    found = with_gradients(lambda *xs: module(*xs)[0], inputs)
    for ours, expected in zip(found, with_gradients(program, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_attention_in_a_vmap() -> None:
    """It arrives as products and a softmax of its own."""

    def program(x: Tensor) -> Tensor:
        return torch.vmap(partial(F.scaled_dot_product_attention, is_causal=True))(x, x, x)

    plan = mosaic.explain(program, torch.randn(2, 3, N, 4), sp_size=2)
    assert [found.mask for found in plan.attentions] == ["causal"]


def test_dropped_weights_that_are_read_twice_stay() -> None:
    def program(q, k, v, pad):
        weights = torch.dropout((q @ k.mT).softmax(-1), 0.5, True)
        return weights @ v + weights.mean()

    assert raised(program, given())[1] == 0


@pytest.mark.parametrize("region", ["scores", "weights", "attention"])
def test_attention_under_no_grad(region: str) -> None:
    """One whose gradient ends halfway stays what it is."""

    def program(x: Tensor, y: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            scores = x @ y.mT
            torch.set_grad_enabled(grad and region == "scores")
            weights = scores.softmax(-1)
            torch.set_grad_enabled(grad and region != "attention")
            out = weights @ y
        return out + x

    x = torch.randn(2, 3, N, 4, requires_grad=True)
    plan = mosaic.explain(program, x, x, sp_size=1)
    assert len(plan.attentions) == (region == "attention")


def test_mask_made_under_no_grad() -> None:
    """What is written for it records gradients: a learned bias meets it."""

    def program(x: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            seen = (x[:, 0, :, 0] > 0)[:, None, None]
        return (x @ x.mT + bias).masked_fill(~seen, -INF).softmax(-1) @ x

    x, bias = torch.randn(2, 3, N, 4), torch.randn(N, N, requires_grad=True)
    module = traced(program, x, bias)
    drop_assertions(module.graph)
    for node in module.graph.nodes:
        is_mask = not is_float(node) or node.target == torch.ops.aten.select.int
        node.meta["modes"] = replace(Modes.current(), grad=not is_mask)
    raise_attention(module.graph, SimpleNamespace())
    written = [n for n in module.graph.nodes if n.target == torch.ops.aten.where.ScalarOther]
    assert written and all(n.meta["modes"].grad for n in written)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("softcap", "softcap 2, causal"),
        ("softcap_of_padding", "softcap 3, padding"),
        ("softcap_views", "softcap 2, causal, bias of keys"),
        ("softcap_and_distances", "softcap 2, float by tiles"),
        ("softcap_twice", "scores by a program"),
    ],
)
def test_a_softcap_is_read_with_its_mask(name: str, words: str) -> None:
    """What stands in the graph then is the same function, run whole."""
    inputs = given()
    module, _ = raised(ATTENTIONS[name], inputs)
    analyze_masks(module.graph, None)
    module.recompile()
    (node,) = module.graph.find_nodes(op="call_function", target=STRUCTURED)
    assert node.meta["mask"] == words
    found = with_gradients(lambda *x: module(*x)[0], inputs)
    for x, y in zip(found, with_gradients(ATTENTIONS[name], inputs), strict=True):
        torch.testing.assert_close(x, y)
