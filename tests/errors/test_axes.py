"""What is refused about methods, mesh axes and two axes in one model: whole messages."""

from __future__ import annotations

import re

import axes_cases
import pytest
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import mosaic
from mosaic import Composed, Hierarchical, Mesh2D, Method, Ring, ShardingSpec, Ulysses

MESH = {"mesh_shape": (2, 3), "mesh_axes": ("r", "c")}
BOTH = {"rows": Ring(mesh="r"), "columns": Ring(mesh="c")}


def refusal(model: nn.Module | None = None, **axes: Method | str) -> str:
    given, (x,), _ = axes_cases.CASES["InTurn"]()
    spec = ShardingSpec(inputs={"x": "batch rows columns"}, axes=axes)
    with pytest.raises(Exception) as caught:
        mosaic.explain(model or given, x, spec=spec, **MESH)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, mosaic.MosaicError), error
    return re.sub(r"\.py:\d+ in", ".py:LINE in", str(error))


def test_a_grid_that_is_not_the_ranks() -> None:
    assert_expected_inline(
        refusal(rows=Mesh2D(2, 2, mesh="r,c")),
        """\
Mesh2D(2, 2) does not fit 6 ranks
  sizes  2 x 2 = 4, ranks = 6
  fix    choose rows x cols equal to the ranks of the mesh axis""",
    )


def test_nodes_that_do_not_divide_the_ranks() -> None:
    assert_expected_inline(
        refusal(rows=Hierarchical(4, mesh="r,c")),
        """\
Hierarchical(4) does not divide 6 ranks into nodes
  sizes  6 = 1 x 4 + 2
  fix    choose a node size that divides the ranks of the mesh axis""",
    )


def test_more_stages_than_ranks() -> None:
    assert_expected_inline(
        refusal(rows=Ring(stages=3, mesh="r")),
        """\
Ring(stages=3) on 2 ranks: there are no more stages than ranks
  fix  use 1 to 2, or "auto\"""",
    )


def test_composed_on_a_mesh_axis_that_is_not_there() -> None:
    method = Composed(heads=Ulysses(mesh="heads"), sequence=Ring(mesh="r"))
    assert_expected_inline(
        refusal(rows=method),
        """\
there is no mesh axis 'heads'
  axes  dp, r, c
  fix   use one of these, or name yours in mosaic.init(mesh_shape=..., mesh_axes=...)""",
    )


def test_a_name_that_needs_numbers() -> None:
    with pytest.raises(mosaic.ShardingError) as caught:
        ShardingSpec(inputs={"x": "batch rows"}, axes={"rows": "mesh2d"})
    assert_expected_inline(
        str(caught.value),
        """\
'mesh2d' needs sizes
  fix  write it as mosaic.Mesh2D(rows, cols)""",
    )


class Crossed(axes_cases.Cells):
    """All cells attend to one vector for each row: keys lie along one of the axes only."""

    def cells(self, x: Tensor) -> Tensor:
        q, k = x.flatten(1, 2), x.mean(dim=2)
        return F.scaled_dot_product_attention(q, k, k)


def test_keys_along_one_of_two_flattened_axes() -> None:
    assert_expected_inline(
        refusal(Crossed().double(), **BOTH),
        """\
an attention over 'rows' and 'columns', flattened, has keys that only some of them cut
  tests/errors/test_axes.py:LINE in cells
    return F.scaled_dot_product_attention(q, k, k)
  sizes  35 queries, 7 keys
  fix    give one of the axes the method 'local'""",
    )


class Folded(axes_cases.Cells):
    """An attention over features, with every cell in the batch, and dropout."""

    def cells(self, x: Tensor) -> Tensor:
        cells = x.flatten(0, 2).unsqueeze(-1)
        y = F.scaled_dot_product_attention(cells, cells, cells, dropout_p=0.5)
        return self.first(self.second(y.view_as(x)).transpose(1, 2))


def test_dropout_where_both_axes_are_in_the_batch() -> None:
    assert_expected_inline(
        refusal(Folded().double(), **BOTH),
        """\
two axes cut the batches of an attention with dropout
  tests/errors/test_axes.py:LINE in cells
    y = F.scaled_dot_product_attention(cells, cells, cells, dropout_p=0.5)
  cuts  7=0:4|4:7 dim=0 outer=2 inner=5; 5=0:2|2:4|4:5 dim=0 outer=14 inner=1
  fix   give one of the axes the method 'local'""",
    )


def test_an_axis_of_three_that_nothing_attends_over() -> None:
    model, (x,), _ = axes_cases.CASES["InTurn"]()
    names = ("batch", "rows", "columns")
    axes = {name: Ring(mesh=mesh) for name, mesh in zip(names, "xyz", strict=True)}
    spec = ShardingSpec(inputs={"x": " ".join(names)}, axes=axes)
    with pytest.raises(Exception) as caught:
        mosaic.explain(model, x, spec=spec, mesh_shape=(2, 1, 2), mesh_axes=("x", "y", "z"))
    assert_expected_inline(
        str(caught.value.inner_exception),
        """\
nothing attends over axis 'batch', so there is no reason to cut it
  sizes  batch = 2; lengths attended over: 5, 7
  fix    name the axis that attention runs over, or leave the spec out to have it found""",
    )
