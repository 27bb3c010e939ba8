"""What a program may hold that Mosaic cannot follow is refused by name: whole messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import contract_cases as cc
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import mosaic
from mosaic import MosaicError
from mosaic.partition import pointwise

X = torch.randn(2, 13, cc.E)


def refusal(change: Callable[[Tensor], Any], x: Tensor = X, **options: Any) -> str:
    attention = cc.Attention()
    return message(lambda x: change(attention(x)), x, **options)


def message(fn: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(Exception) as caught:
        mosaic.explain(fn, *args, sp_size=2, **options)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, MosaicError), error
    return re.sub(r"\.py:\d+ in", ".py:LINE in", str(error))


@torch.library.custom_op("mosaic_tests::twice_", mutates_args=("x",))
def twice_(x: Tensor) -> None:
    x.mul_(2)


def cond(y: Tensor) -> Tensor:
    return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))


def flex(y: Tensor) -> Tensor:
    q = y.unflatten(-1, (2, -1)).transpose(1, 2)
    return flex_attention(q, q, q, lambda score, b, h, i, j: torch.sigmoid(score))


def decoded(y: Tensor) -> Tensor:
    q, begins = y.unflatten(-1, (2, -1))[0], torch.tensor([0, y.shape[1]], dtype=torch.int32)
    used = begins[1:]
    return varlen_attn(q, q, q, begins, begins, 9, 9, seqused_k=used)


def no_policy() -> tuple[nullcontext, nullcontext]:
    return nullcontext(), nullcontext()


def entered(y: Tensor) -> Tensor:
    return checkpoint(torch.sin, y, use_reentrant=False, context_fn=no_policy)


def loop(y: Tensor) -> Tensor:
    def more(n: Tensor, y: Tensor) -> Tensor:
        return n < 3

    def step(n: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return n + 1, y * 2

    return torch.while_loop(more, step, (torch.zeros(()), y))[1]


def written(y: Tensor) -> Tensor:
    y = y.clone()
    twice_(y)
    return y


def hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda grad: grad * 2)
    return y * 3


def nested(y: Tensor) -> Tensor:
    ends = torch.tensor([0, 5, 13])
    return torch.nested.nested_tensor_from_jagged(y[0], ends).sin().values()


class Layered(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.attention = layer, cc.Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.layer(x))


def test_a_condition() -> None:
    assert_expected_inline(
        refusal(cond),
        """\
cond holds a program of its own, which Mosaic does not cut
  tests/errors/test_refused.py:LINE in cond
    return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))
  fix  compute both and choose with torch.where, or do it outside of the compiled function (torch.compiler.disable: what passes is whole)""",  # noqa: E501
    )


def test_a_score_mod_that_is_not_followed() -> None:
    assert_expected_inline(
        message(flex, X),
        """\
a call of flex or flash attention changes its scores in a way that is not followed
  tests/errors/test_refused.py:LINE in flex
    return flex_attention(q, q, q, lambda score, b, h, i, j: torch.sigmoid(score))
  reason  its score_mod may multiply a score by a number, cap it by tanh, add to it what is made of positions and tensors, and hide it, in this order
  fix     say what is hidden in mask_mod; or write it as a product, a softmax and a product, which stays whole on every rank""",  # noqa: E501
    )


def test_varlen_attention_with_a_cache() -> None:
    assert_expected_inline(
        message(decoded, X).partition("\n\nWhile executing")[0],
        """\
a call of flash attention with seqused_k
  tests/errors/test_refused.py:LINE in decoded
    return varlen_attn(q, q, q, begins, begins, 9, 9, seqused_k=used)
  reason  it is for decoding with a cache, for looking at the weights, or in the package's own language
  fix     leave it out, or call it outside of the compiled function""",  # noqa: E501
    )


def test_contexts_of_a_checkpoint_that_are_no_policy() -> None:
    assert_expected_inline(
        refusal(entered),
        """\
a checkpoint has a context_fn that is no policy, and a compiled program enters no contexts
  tests/errors/test_refused.py:LINE in entered
    return checkpoint(torch.sin, y, use_reentrant=False, context_fn=no_policy)
  fix  give it torch.utils.checkpoint.create_selective_checkpoint_contexts with a policy, or leave context_fn out""",  # noqa: E501
    )


def test_a_loop_that_depends_on_data() -> None:
    assert_expected_inline(
        refusal(loop),
        """\
while_loop holds a program of its own, which Mosaic does not cut
  tests/errors/test_refused.py:LINE in loop
    return torch.while_loop(more, step, (torch.zeros(()), y))[1]
  fix  write the loop in Python, which is unrolled, or do it outside of the compiled function (torch.compiler.disable: what passes is whole)""",  # noqa: E501
    )


def test_an_op_that_writes_to_its_input() -> None:
    assert_expected_inline(
        refusal(written, X.clone()),
        """\
mosaic_tests::twice_ writes to its input, and nothing is known of what it writes
  tests/errors/test_refused.py:LINE in written
    twice_(y)
  fix  define it with mutates_args=() and return what it makes, or call it outside of the compiled function""",  # noqa: E501
    )


def test_a_hook() -> None:
    assert_expected_inline(
        refusal(hooked, X.clone().requires_grad_()),
        """\
a hook on the gradient of a tensor in the program (register_hook)
  tests/errors/test_refused.py:LINE in hooked
    y.register_hook(lambda grad: grad * 2)
  reason  it would be given the gradient of this rank's part
  fix     write what it does as a torch.autograd.Function, whose backward is run whole, or put the hook on a parameter or an input, outside of the compiled function""",  # noqa: E501
    )


def test_a_nested_tensor() -> None:
    assert_expected_inline(
        refusal(nested),
        """\
nested_view_from_values_offsets_lengths is a NestedTensor, and Mosaic cuts plain tensors only
  tests/errors/test_refused.py:LINE in nested
    return torch.nested.nested_tensor_from_jagged(y[0], ends).sin().values()
  fix  pad to one length, and pass a mask or ids of documents""",
    )


def test_a_parameter_of_a_subclass() -> None:
    layer = nn.Linear(cc.E, cc.E)
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    model = Layered(layer)
    assert_expected_inline(
        message(model, X),
        """\
layer.weight is a TwoTensor, and Mosaic cuts plain tensors only
  tests/errors/test_refused.py:LINE in forward
    return self.attention(self.layer(x))
  fix  use plain tensors inside of it, or do it outside of the compiled function (torch.compiler.disable: what passes is whole)""",  # noqa: E501
    )


def test_a_gather_that_only_an_operand_needs() -> None:
    """An op that is local, but for an operand: it is announced, and refused where that is asked."""
    spec = mosaic.ShardingSpec(on_gather="error")
    assert_expected_inline(
        refusal(lambda y: y @ y.mT, spec=spec),
        """\
aten.matmul cannot run on a part of axis 'x.1': has an operand that is cut along another dim
  tests/errors/test_refused.py:LINE in <lambda>
    refusal(lambda y: y @ y.mT, spec=spec),
  sizes  [2, 8, 13]
  fix    allow it with on_gather="warn" (every rank then computes it whole), or keep this op out of the sharded part""",  # noqa: E501
    )
    plan = mosaic.explain(lambda x: cc_attention(x) @ x.mT, X, sp_size=2)
    assert [said.split(" [")[0] for said in plan.gathered] == [
        "aten.matmul has an operand that is cut along another dim"
    ]


cc_attention = cc.Attention()


def test_an_exception_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: it has the user's line, and Dynamo cannot take it for a graph break."""

    def broken(*_: Any) -> None:
        raise torch._subclasses.fake_tensor.DataDependentOutputException(torch.ops.aten.item)

    monkeypatch.setattr(pointwise, "meeting", broken)
    assert_expected_inline(
        refusal(lambda y: y.tan()),
        """\
this depends on values, and a program is cut before there are any
  tests/errors/test_refused.py:LINE in <lambda>
    refusal(lambda y: y.tan()),
  error  DataDependentOutputException: aten.item
  fix    keep this part out of the compiled function (torch.compiler.disable; what passes it is whole on every rank), and report the program""",  # noqa: E501
    )


def test_a_value_that_was_cut_is_no_recipe() -> None:
    """What ``F.mse_loss`` broadcasts is a list: every rank would compute the model twice."""
    attention = cc.Attention()
    plan = mosaic.explain(lambda x: nn.functional.mse_loss(attention(x), x), X, sp_size=2)
    assert len(plan.attentions) == 1
    attended = [n for n in plan.graphs["local"].nodes if "attention" in str(n.target)]
    assert len(attended) == 1
