"""What a new user may get wrong before anything is compiled or sent: whole messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import contract_cases as cc
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

import mosaic
from mosaic import Layout, Ring, ShardingSpec, explain
from mosaic.attention import kernels
from mosaic.runtime.autograd_functions import AUTOGRAD_FUNCTIONS

X = torch.randn(2, 13, cc.E)


def attend(x: Tensor) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q).squeeze(1)


def message_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, mosaic.MosaicError), error
    return re.sub(r"\.py:\d+ in", ".py:LINE in", str(error))


@pytest.fixture
def alone() -> Iterator[None]:
    context = mosaic.init()
    yield
    context.shutdown()


# --- sizes ------------------------------------------------------------------------------------


def test_an_axis_of_length_0() -> None:
    spec = ShardingSpec(inputs={"x": "b n e"}, axes={"n": "ring"})
    assert_expected_inline(
        message_of(explain, attend, X[:, :0], spec=spec, sp_size=2),
        """\
axis 'n' has length 0
  tests/errors/test_inputs.py:LINE in attend
    return F.scaled_dot_product_attention(q, q, q).squeeze(1)
  sizes  q [2, 1, 0, 8], k [2, 1, 0, 8], v [2, 1, 0, 8]
  fix    leave the call out where there is nothing to attend to""",
    )


def test_a_batch_of_0() -> None:
    assert_expected_inline(
        message_of(explain, attend, X[:0], sp_size=2),
        """\
an attention of empty tensors is cut
  tests/errors/test_inputs.py:LINE in attend
    return F.scaled_dot_product_attention(q, q, q).squeeze(1)
  sizes  q [0, 1, 13, 8], k [0, 1, 13, 8], v [0, 1, 13, 8]
  fix    leave the call out where there is nothing to attend to""",
    )


def test_nothing_is_cut_for_one_rank() -> None:
    assert explain(attend, X[:, :0], sp_size=1).ranks == 1


# --- the spec ---------------------------------------------------------------------------------


def test_axes_as_a_list() -> None:
    text = message_of(ShardingSpec, inputs={"x": "b n e"}, axes=["n"])
    assert_expected_inline(
        text,
        """\
axes = ['n'] is no dict
  fix  give each axis a method: axes={'rows': 'ring'}, or axes={1: 'ring'} by its dim""",
    )


def test_inputs_as_a_string() -> None:
    assert_expected_inline(
        message_of(ShardingSpec, inputs="b n e", axes={"n": "ring"}),
        """\
inputs = 'b n e' is no dict
  fix  give names to the dims of arguments: inputs={'x': 'batch rows features'}""",
    )


def test_names_as_a_list() -> None:
    text = message_of(ShardingSpec, inputs={"x": ["b", "n", "e"]}, axes={"n": "ring"})
    assert_expected_inline(
        text,
        """\
the names of input 'x' are no string
  names  ['b', 'n', 'e']
  fix    write them in one string, with spaces: 'batch rows features'""",
    )


def test_a_name_twice() -> None:
    text = message_of(ShardingSpec, inputs={"x": "b n n"}, axes={"n": "ring"})
    assert_expected_inline(
        text,
        """\
input 'x' has the name 'n' twice
  names  'b n n'
  fix    give each dim a name of its own, as in 'batch rows columns'""",
    )


def test_names_with_commas() -> None:
    text = message_of(ShardingSpec, inputs={"x": "b, n, e"}, axes={"n": "ring"})
    assert_expected_inline(
        text,
        """\
'b,' of input 'x' is no name
  names  'b, n, e'
  fix    write a word for each dim, with spaces: 'batch rows features'""",
    )


def test_dims_without_a_name() -> None:
    spec = ShardingSpec(inputs={"x": "_ n _"}, axes={"n": "ring"})
    assert explain(attend, X, spec=spec, sp_size=2).axis == "n"


def test_an_axis_that_is_none() -> None:
    assert_expected_inline(
        message_of(ShardingSpec, axes={1.0: "ring"}),
        """\
axis 1.0 is neither a name nor the number of a dim
  fix  write axes={'rows': 'ring'} with names, or axes={1: 'ring'} without""",
    )


def test_a_mesh_axis_without_a_name() -> None:
    assert_expected_inline(
        message_of(ShardingSpec, mesh_axis=3),
        """\
mesh_axis = 3 is no name of a mesh axis
  fix  use a name of mosaic.init's mesh, such as 'sp'""",
    )
    assert_expected_inline(
        message_of(Ring, mesh=None),
        """\
Ring(mesh=None) is no name of a mesh axis
  fix  use a name, such as mesh="sp", or mesh="a,b" for two as one""",
    )


@pytest.mark.parametrize("given", ["float32", "torch.float32", torch.float32])
def test_a_dtype_by_its_name(given: Any) -> None:
    assert Ring(grad_dtype=given) == Ring(grad_dtype=torch.float32)


def test_a_dtype_that_is_none() -> None:
    assert_expected_inline(
        message_of(Ring, grad_dtype="float23"),
        """\
Ring(grad_dtype='float23') is no dtype of a gradient
  fix  use torch.float64, torch.float32, torch.float16, torch.bfloat16, or None for that of K""",
    )
    assert_expected_inline(
        message_of(Ring, grad_dtype=torch.int32),
        """\
Ring(grad_dtype=torch.int32) is no dtype of a gradient
  fix  use torch.float64, torch.float32, torch.float16, torch.bfloat16, or None for that of K""",
    )


def test_a_dtype_that_rounds_is_in_the_plan() -> None:
    notes = [
        explain(
            attend, X.to(dtype), spec=ShardingSpec(axes={1: Ring(grad_dtype="float32")}), sp_size=2
        ).notes
        for dtype in (torch.float64, torch.float32)
    ]
    assert notes == [["grad_dtype=float32 is narrower than the keys: it rounds dK and dV"], []]


# --- explain and the decorator ------------------------------------------------------------------


@pytest.mark.parametrize("given", [0, -1, 1.5, "2", True])
def test_sp_size(given: Any) -> None:
    want = f"sp_size = {given!r} is no number of ranks\n"
    assert message_of(explain, attend, X, sp_size=given).startswith(want)
    assert message_of(mosaic.init, sp_size=given).startswith(want)


def test_a_mesh_shape_that_is_a_number() -> None:
    text = message_of(explain, attend, X, mesh_shape=4, mesh_axes=("r", "c"))
    assert_expected_inline(
        text,
        """\
mesh_shape = 4 is no list of sizes
  fix  give a size for each mesh axis: mesh_shape=(2, 2)""",
    )


def test_mesh_axes_as_a_string() -> None:
    text = message_of(explain, attend, X, mesh_shape=(2, 2), mesh_axes="rc")
    assert_expected_inline(
        text,
        """\
mesh_axes = 'rc' are no names of mesh axes
  fix  give a word for each mesh axis: mesh_axes=("rows", "columns")""",
    )


def test_a_mesh_shape_without_names() -> None:
    message_of(explain, attend, X, mesh_shape=(2, 2))
    assert not torch.distributed.is_initialized()  # no fake group is left behind


def test_explain_leaves_the_processs_last_words() -> None:
    hook = sys.excepthook
    explain(attend, X, sp_size=2)
    assert sys.excepthook is hook


def test_a_rank_that_is_not_there() -> None:
    assert_expected_inline(
        message_of(explain, attend, X, sp_size=2, rank=2),
        """\
there is no rank 2 among 2
  fix  count them from 0""",
    )


def test_other_ranks_than_there_are(alone: None) -> None:
    assert explain(attend, X, sp_size=1).ranks == 1
    assert_expected_inline(
        message_of(explain, attend, X, sp_size=4),
        """\
a plan for other ranks than those of mosaic.init
  asked  sp = 4
  there  dp = 1, sp = 1
  fix    leave the sizes out, or call mosaic.get_context().shutdown() first""",
    )


def test_explain_without_a_function() -> None:
    assert_expected_inline(
        message_of(explain, 3, sp_size=2),
        """\
cannot explain 3: it is no function
  fix  pass the model, then its arguments: mosaic.explain(model, x, sp_size=4)""",
    )


def test_explain_without_tensors() -> None:
    assert_expected_inline(
        message_of(explain, lambda x: x * 2, 3, sp_size=2),
        """\
nothing was compiled: the program has no tensor operation that torch.compile sees
  fix  pass a model and tensors for it; it must not be under torch.compiler.disable""",
    )


def test_a_spec_that_is_a_dict() -> None:
    assert_expected_inline(
        message_of(explain, attend, X, spec={}, sp_size=2),
        """\
spec is a dict
  fix  pass a mosaic.ShardingSpec""",
    )


def test_a_mesh_that_is_a_tuple() -> None:
    assert_expected_inline(
        message_of(mosaic.init, mesh=(2, 2)),
        """\
mesh = (2, 2) is no DeviceMesh
  fix  pass a DeviceMesh, or mesh_shape=(2, 2) and mesh_axes=("rows", "columns")""",
    )


def test_a_decorator_without_parentheses() -> None:
    assert_expected_inline(
        message_of(mosaic.shard, nn.Linear),
        """\
mosaic.shard was given Linear itself
  fix  write @mosaic.shard() with parentheses, or mosaic.shard()(model)""",
    )


# --- tensors and layouts ------------------------------------------------------------------------


def test_a_class_for_a_model(alone: None) -> None:
    assert_expected_inline(
        message_of(mosaic.sum_gradients, nn.Linear),
        """\
<class 'torch.nn.modules.linear.Linear'> is no nn.Module
  fix  pass the model, built already""",
    )


def test_a_dim_that_is_not_there(alone: None) -> None:
    assert_expected_inline(
        message_of(mosaic.shard_tensor, X, 3),
        """\
there is no dim 3 in the tensor
  sizes  [2, 13, 8]
  fix    use one of its 3 dims, from 0 or from -1""",
    )
    assert_expected_inline(
        message_of(mosaic.gather, X, "rows"),
        """\
there is no dim 'rows' in the tensor
  sizes  [2, 13, 8]
  fix    use one of its 3 dims, from 0 or from -1""",
    )


def test_no_tensor(alone: None) -> None:
    assert_expected_inline(
        message_of(mosaic.shard_tensor, [1, 2], 0),
        """\
a list is no tensor
  fix  pass a torch.Tensor""",
    )
    assert message_of(mosaic.distribute, [1, 2], 0) == message_of(mosaic.shard_tensor, [1, 2], 0)


def test_a_layout_that_is_none(alone: None) -> None:
    assert_expected_inline(
        message_of(mosaic.shard_tensor, X, 1, layout="even"),
        """\
layout = 'even' is no layout
  fix  make one: mosaic.Layout.even(n, p), Layout.zigzag(n, p), Layout.of(n, ranks)""",
    )
    assert message_of(mosaic.distribute, X, 1, layout="even").startswith("layout = 'even' is no")
    assert message_of(mosaic.ShardedTensor.from_local, X, 1, "even").startswith("layout = 'even' i")


@pytest.mark.parametrize("held", [(0, 12), (-1, 12), (1, 14), (0, 14)])
def test_a_layout_of_another_axis(alone: None, held: tuple[int, int]) -> None:
    for cut in (mosaic.shard_tensor, mosaic.distribute):
        text = message_of(cut, X, 1, layout=Layout.of(13, [[held]]))
        assert text.startswith("the layout holds an index twice, or leaves one out\n"), text


def test_layouts_of_nothing() -> None:
    assert_expected_inline(
        message_of(Layout.even, 13, 0),
        """\
p = 0 in a layout
  fix  use a whole number, 1 or more""",
    )
    assert_expected_inline(
        message_of(Layout.zigzag, 13.0, 2),
        """\
n = 13.0 in a layout
  fix  use a whole number, 0 or more""",
    )
    assert_expected_inline(
        message_of(Layout.of, 4, [(0, 2), (2, 4)]),
        """\
a layout takes a list of (start, stop) for each rank
  fix  write Layout.of(4, [[(0, 2)], [(2, 4)]])""",
    )


def test_axes_by_name_and_by_number() -> None:
    assert_expected_inline(
        message_of(ShardingSpec, inputs={"x": "b n e"}, axes={1: "ring", "n": "ring"}),
        """\
axes are given by name and by the number of a dim
  axes  1, 'n'
  fix   write axes={'rows': 'ring'} with names, or axes={1: 'ring'} without""",
    )


class Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def test_what_torch_raises_is_no_graph_break(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would go on eagerly after such an error of its own."""

    def failing(*args: Any) -> None:
        raise DataDependentOutputException("aten._local_scalar_dense.default")

    monkeypatch.setattr("mosaic.frontend.backend.capture", failing)
    compiled = torch.compile(attend, backend="mosaic", options={"inner": "eager"})
    assert "DataDependentOutputException: aten._local_scalar_dense" in message_of(compiled, X)


def test_explain_leaves_other_functions_compiled() -> None:
    compiles: list[int] = []

    def counting(module: Any, inputs: Any) -> Any:
        compiles.append(1)
        return module.forward

    mine = torch.compile(lambda x: x.sin(), backend=counting)
    mine(X)
    plans = [explain(attend, X, sp_size=2) for _ in range(2)]
    mine(X)
    assert len(compiles) == 1
    assert [len(plan.attentions) for plan in plans] == [1, 1]


def test_nothing_is_kept_of_a_users_function() -> None:
    before = set(AUTOGRAD_FUNCTIONS.calls)
    explain(lambda x: attend(Copies.apply(x)), X.clone().requires_grad_(), sp_size=2)
    assert set(AUTOGRAD_FUNCTIONS.calls) == before


def test_a_kernel_is_chosen_for_one_thread_only() -> None:
    with kernels.using("math"), ThreadPoolExecutor(1) as other:
        assert [k.name for k in kernels._table()] == ["math"]
        assert other.submit(kernels._table).result() == kernels.KERNELS


@pytest.mark.parametrize("n", [[1], torch.ones(2), "7", None, -1])
def test_no_length_of_a_layout(n: Any) -> None:
    for make in (Layout.even, Layout.zigzag):
        assert message_of(make, n, 2).startswith("n = ")
    assert message_of(Layout.of, n, {"x": 1}).startswith("n = ")
    assert message_of(Layout.of, 4, {"x": 1}).startswith("a layout takes a list of (start, stop)")


def test_no_number_for_an_attention(alone: None) -> None:
    q = torch.randn(1, 2, 3, 8)
    assert message_of(mosaic.attention, q, q, q, dropout=()).startswith("dropout = () is no")
    assert message_of(mosaic.attention, q, q, q, scale="x").startswith("scale = 'x' is no number")


def test_no_such_gpu() -> None:
    assert message_of(mosaic.init, device="cuda:99").startswith("there is no device 'cuda:99'")
