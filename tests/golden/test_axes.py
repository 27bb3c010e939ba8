"""Two axes of one model on a mesh of 2 x 3: what is decided, and the program of one rank."""

from __future__ import annotations

import axes_cases
import pytest
import torch
import torch.nn.functional as F
from plan_text import collectives
from torch import Tensor

import mosaic
from mosaic import AllGather, Plan, Ring, ShardingSpec, Ulysses

CELLS = torch.randn(2, 7, 5, 4).double()


@pytest.fixture
def together():
    def plan(fn, x: Tensor, **axes) -> Plan:
        names = ("batch", "rows", "columns", "features")[: x.ndim]
        spec = ShardingSpec(inputs={"x": " ".join(names)}, axes=axes)
        world = {"mesh_shape": (2, 3), "mesh_axes": ("r", "c"), "rank": 1}
        return mosaic.explain(fn, x, spec=spec, **world)

    return plan


def decided(plan: Plan) -> str:
    rows = [f"{plan.axis} over {plan.ranks} ranks: {plan.layout}"]
    rows += [f"{a.axis} {a.queries} x {a.keys} {a.bytes} B" for a in plan.attentions]
    return "\n".join([*rows, collectives(plan)])


def test_plan_of_two_axes(together, check):
    model, (x,), _ = axes_cases.CASES["InTurnFlat"]()
    check(
        decided(together(model, x, rows=Ring(mesh="r"), columns=Ulysses(mesh="c"))),
        """\
rows, columns over 6 ranks: 7=0:4|4:7, 5=0:2|2:4|4:5
columns 5 x 5 2986 B
rows 7 x 7 1792 B
1 x all_reduce rows 128 B: sum over the axis
1 x all_reduce rows 8 B: sum over the axis
1 x all_reduce columns 170 B: sum over the axis
1 x all_reduce columns 597 B: largest over the axis
2 x all_reduce columns 597 B: sum over the axis
1 x all_reduce columns 10 B: sum over the axis
1 x all_reduce rows 4992 B: gradients of whole tensors, in backward
1 x all_reduce columns 6485 B: gradients of whole tensors, in backward
""",
    )


def test_plan_of_two_axes_flattened(together, check):
    model, (x,), _ = axes_cases.CASES["Flattened"]()
    check(
        decided(together(model, x, rows=Ring(mesh="r"), columns=AllGather(mesh="c"))),
        """\
rows, columns over 6 ranks: 7=0:4|4:7, 5=0:2|2:4|4:5
rows x columns 35 x 35 7466 B
1 x all_reduce rows 8 B: sum over the axis
1 x all_reduce columns 10 B: sum over the axis
1 x all_reduce rows 2560 B: gradients of whole tensors, in backward
1 x all_reduce columns 3413 B: gradients of whole tensors, in backward
""",
    )


def averaged(x: Tensor) -> Tensor:
    x = F.scaled_dot_product_attention(x, x, x)
    x = x.transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x).mean(dim=1)


def test_places_of_two_axes(together, check):
    plan = together(averaged, CELLS, rows=Ring(mesh="r"), columns=Ring(mesh="c"))
    check(
        plan.diffs["propagate"],
        """\
-x: f64[2, 7, 5, 4]
+x: f64[2, 7/r, 5/c, 4]
 # x = F.scaled_dot_product_attention(x, x, x)
-sdpa: f64[2, 7, 5, 4] = sdpa(x, x, x)
+sdpa: f64[2, 7/r, 5/c, 4] = sdpa(x, x, x)
 # x = x.transpose(1, 2)
-transpose: f64[2, 5, 7, 4] = transpose(sdpa, 1, 2)
+transpose: f64[2, 5/c, 7/r, 4] = transpose(sdpa, 1, 2)
 # return F.scaled_dot_product_attention(x, x, x).mean(dim=1)
-sdpa_1: f64[2, 5, 7, 4] = sdpa(transpose, transpose, transpose)
-mean: f64[2, 7, 4] = mean(sdpa_1, [1])
+sdpa_1: f64[2, 5/c, 7/r, 4] = sdpa(transpose, transpose, transpose)
+mean: f64[2, 7/r, 4] = mean(sdpa_1, [1])
 return [mean]
""",
    )


def test_program_of_two_axes(together, check):
    plan = together(averaged, CELLS, rows=Ring(mesh="r"), columns=Ring(mesh="c"))
    check(
        plan.diffs["partition"],
        """\
 x: f64[2, 7/r, 5/c, 4]
+slice_to: f64[2, 7, 2, 4] = slice_to(x, shard(5=0:2|2:4|4:5 dim=2))
+slice_to_1: f64[2, 4, 2, 4] = slice_to(slice_to, shard(7=0:4|4:7 dim=1))
 # x = F.scaled_dot_product_attention(x, x, x)
-sdpa: f64[2, 7/r, 5/c, 4] = sdpa(x, x, x)  # ring(stages=2)
+sdpa: f64[2, 4, 2, 4] = sdpa(slice_to_1, slice_to_1, slice_to_1)  # ring(stages=2), 5 x 5
 # x = x.transpose(1, 2)
-transpose: f64[2, 5/c, 7/r, 4] = transpose(sdpa, 1, 2)
+transpose: f64[2, 2, 4, 4] = transpose(sdpa, 1, 2)
 # return F.scaled_dot_product_attention(x, x, x).mean(dim=1)
-sdpa_1: f64[2, 5/c, 7/r, 4] = sdpa(transpose, transpose, transpose)  # ring(stages=2)
-mean: f64[2, 7/r, 4] = mean(sdpa_1, [1])
-return [mean]
+sdpa_1: f64[2, 2, 4, 4] = sdpa(transpose, transpose, transpose)  # ring(stages=2), 7 x 7
+mean: f64[2, 4, 4] = sum(sdpa_1, [1])
+sum_across: f64[2, 4, 4] = sum_across(mean, c, 'sum')
+mean_1: f64[2, 4, 4] = div(sum_across, 5)
+gather: f64[2, 7, 4] = mosaic.gather(mean_1, shard(7=0:4|4:7 dim=1))
+return [gather]
""",
    )
