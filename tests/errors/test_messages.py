"""Every message as the user reads it, whole. They are part of the API."""

from __future__ import annotations

import re

import contract_cases as cc
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import mosaic
from mosaic import ShardingError, ShardingSpec


def message_of(call, *args, **kwargs) -> str:
    """Our error's text; Dynamo wraps what a backend raises and keeps ours inside."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, mosaic.MosaicError), error
    return re.sub(r"\.py:\d+ in", ".py:LINE in", str(error))


def explained(fn, *args, spec=None, p=4) -> str:
    return message_of(mosaic.explain, fn, *args, spec=spec, sp_size=p)


X = torch.randn(2, 13, cc.E)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = cc.Attention()

    def forward(self, x, batch=None):
        return self.attention(x)


class ChangedInPlace(Model):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cc.E))

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return self.attention(x * self.weight)


def test_a_parameter_changed_in_place() -> None:
    assert_expected_inline(
        explained(ChangedInPlace(), X),
        """\
weight is changed in place under no_grad, and learned
  tests/errors/test_messages.py:LINE in forward
    self.weight.clamp_(-1, 1)
  fix  change it outside of the compiled model (after an optimiser's step), or use a changed copy: w.clamp(-1, 1), not w.clamp_(-1, 1) or max_norm""",  # noqa: E501
    )


def test_unknown_axis_name() -> None:
    text = message_of(ShardingSpec, inputs={"x": "batch tokens features"}, axes={"rows": "ring"})
    assert_expected_inline(
        text,
        """\
axis 'rows' is named by no input
  inputs  x: 'batch tokens features'
  fix     give the dim a name, as in inputs={'x': 'batch rows features'}""",
    )


def test_unknown_method() -> None:
    text = message_of(ShardingSpec, inputs={"x": "batch rows"}, axes={"rows": "star"})
    assert_expected_inline(
        text,
        """\
there is no method 'star'
  fix  use one of 'auto', 'local', 'ring', 'all_gather', 'ulysses', or an object such as mosaic.Mesh2D(2, 2)""",  # noqa: E501
    )


def test_unknown_argument_path() -> None:
    spec = ShardingSpec(inputs={"batch['ids']": "batch tokens features"}, axes={"tokens": "ring"})
    assert_expected_inline(
        explained(Model(), X, spec=spec),
        """\
no tensor argument of the compiled function is called "batch['ids']"
  arguments  x
  fix        use these names (or paths such as batch['ids']) as keys of inputs""",
    )


def test_a_path_that_is_none() -> None:
    text = message_of(ShardingSpec, inputs={"x[": "batch rows"}, axes={"rows": "ring"})
    assert_expected_inline(
        text,
        """\
'x[' is not an argument path
  fix  write it as x, src[0] or batch['ids']""",
    )


def test_names_that_do_not_fit_the_dims() -> None:
    spec = ShardingSpec(inputs={"x": "batch tokens"}, axes={"tokens": "ring"})
    assert_expected_inline(
        explained(Model(), X, spec=spec),
        """\
x has 3 dims, and 2 names were given
  names  batch tokens
  sizes  [2, 13, 8]
  fix    give each dim a name, and _ to those that do not matter""",
    )


def test_nothing_attends_over_the_axis() -> None:
    spec = ShardingSpec(inputs={"x": "batch tokens features"}, axes={"batch": "ring"})
    assert_expected_inline(
        explained(Model(), X, spec=spec),
        """\
nothing attends over axis 'batch', so there is no reason to cut it
  sizes  batch = 2; lengths attended over: 13
  fix    name the axis that attention runs over, or leave the spec out to have it found""",
    )


class BreaksBefore(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return super().forward(x)


def test_attention_behind_a_break() -> None:
    """What a named axis cuts stays cut over the break, and the attention behind it is found."""
    spec = ShardingSpec(inputs={"x": "batch tokens features"}, axes={"tokens": "ring"})
    plan = mosaic.explain(BreaksBefore(), X, spec=spec, sp_size=4)
    assert [(a.axis, a.method) for a in plan.attentions] == [("tokens", "ring(stages=2)")]
    assert plan.notes == ["2 graphs: the program breaks; what is cut stays cut in between"]


def test_a_mesh_axis_that_is_not_there() -> None:
    method = mosaic.Composed(heads=mosaic.Ulysses(mesh="h"), sequence=mosaic.Ring(mesh="s"))
    spec = ShardingSpec(inputs={"x": "batch tokens features"}, axes={"tokens": method})
    assert_expected_inline(
        message_of(
            mosaic.explain, Model(), X, spec=spec, mesh_shape=(2, 2), mesh_axes=("s", "heads")
        ),
        """\
there is no mesh axis 'h'
  axes  dp, s, heads
  fix   use one of these, or name yours in mosaic.init(mesh_shape=..., mesh_axes=...)""",
    )


def test_an_op_without_an_exact_local_form() -> None:
    class Cumulative(Model):
        def forward(self, x):
            return self.attention(x).sort(1)[0]

    spec = ShardingSpec(on_gather="error")
    assert_expected_inline(
        explained(Cumulative(), X, spec=spec),
        """\
aten.sort cannot run on a part of axis 'x.1': works along the axis
  tests/errors/test_messages.py:LINE in forward
    return self.attention(x).sort(1)[0]
  sizes  [2, 13, 8]
  fix    allow it with on_gather="warn" (every rank then computes it whole), or keep this op out of the sharded part""",  # noqa: E501
    )


def test_dims_of_several_arguments() -> None:
    spec = ShardingSpec(axes={1: "ring"})
    assert_expected_inline(
        explained(lambda x, y: cc_attention(x) + y, X, X + 1, spec=spec),
        """\
axes={1: ...} needs a single tensor argument
  arguments  x, y
  fix        name its dims instead: inputs={'x': 'batch rows columns'}, axes={'rows': 'ring'}""",
    )


def cc_attention(x):
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q).squeeze(1)


def test_unknown_options() -> None:
    compiled = torch.compile(Model(), backend="mosaic", options={"sepc": None})
    assert_expected_inline(
        message_of(compiled, X),
        """\
unknown options: sepc
  fix  options are 'spec' and 'inner'""",
    )


def test_wrong_choices() -> None:
    assert_expected_inline(
        message_of(ShardingSpec, outputs="pieces"),
        """\
outputs = 'pieces' is not a choice
  fix  use one of 'whole', 'shards'""",
    )
    assert_expected_inline(
        message_of(ShardingSpec, check_inputs=torch.ones(2)),
        """\
check_inputs = tensor([1., 1.]) is not a choice
  fix  use one of 'always', 'first', False""",
    )
    compiled = torch.compile(Model(), backend="mosaic", options={"inner": "tvm"})
    assert_expected_inline(
        message_of(compiled, X),
        """\
there is no inner compiler 'tvm'
  fix  use 'inductor' or 'eager'""",
    )


def test_a_tensor_without_a_layout() -> None:
    assert_expected_inline(
        message_of(mosaic.gather, X),
        """\
this tensor carries no layout
  sizes  [2, 13, 8]
  fix    say how it is cut: mosaic.gather(x, dim, layout=...); of a ShardedTensor take x.full_tensor()""",  # noqa: E501
    )


def test_errors_are_named_after_the_package() -> None:
    assert ShardingError.__module__ == "mosaic"
    assert issubclass(ShardingError, mosaic.MosaicError)
