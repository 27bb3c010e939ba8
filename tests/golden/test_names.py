"""Names bind to arguments, dims of the only tensor do, and without names the axis is found."""

from __future__ import annotations

import subprocess
import sys

import contract_cases as cc
import torch
from torch import nn

import mosaic
from mosaic import ShardingSpec

X = torch.randn(2, 13, cc.E)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = cc.Attention()

    def forward(self, batch, src=None, **kwargs):
        x = batch["ids"] if batch else src[0] if src else kwargs["x"]
        return self.attention(x)


def axis(model: nn.Module, *args, spec: ShardingSpec | None = None, **kwargs) -> tuple[str, str]:
    plan = mosaic.explain(model, *args, spec=spec, sp_size=3, **kwargs)
    return plan.axis, plan.layout


def named(path: str) -> ShardingSpec:
    return ShardingSpec(inputs={path: "batch tokens features"}, axes={"tokens": "ring"})


CUT = "13=0:5|5:10|10:13"


def test_paths_reach_into_arguments() -> None:
    assert axis(Nested(), {"ids": X}, spec=named('batch["ids"]')) == ("tokens", CUT)
    assert axis(Nested(), None, (X, 1), spec=named("src[0]")) == ("tokens", CUT)
    assert axis(Nested(), None, x=X, spec=named("x")) == ("tokens", CUT)


def test_dims_of_the_only_tensor() -> None:
    spec = ShardingSpec(axes={1: "ring", 2: "local"})
    assert axis(cc.Mean(), X, spec=spec) == ("1", CUT)
    assert axis(cc.Mean(), X, spec=ShardingSpec(axes={-2: "ring"})) == ("-2", CUT)


def test_the_longest_attended_axis_is_found() -> None:
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = cc.Attention(), cc.Attention()

        def forward(self, x):
            b, r, c, e = x.shape
            x = self.columns(x.reshape(b * r, c, e)).reshape(b, r, c, e).transpose(1, 2)
            return self.rows(x.reshape(b * c, r, e))

    assert axis(Table(), torch.randn(2, 13, 5, cc.E)) == ("x.1", CUT)
    assert axis(Table(), torch.randn(2, 5, 13, cc.E)) == ("x.2", CUT)


def test_local_axes_stay_whole() -> None:
    spec = ShardingSpec(inputs={"x": "batch tokens features"}, axes={"tokens": "local"})
    plan = mosaic.explain(cc.Mean(), X, spec=spec, sp_size=3)
    assert plan.axis == "" and plan.notes == ["every axis is 'local': nothing is cut"]


def test_no_attention_leaves_the_graph_whole() -> None:
    plan = mosaic.explain(nn.Linear(cc.E, 3), X, sp_size=3)
    assert plan.notes == ["no attention in this graph: it stays whole"]


def test_the_backend_is_known_without_an_import() -> None:
    code = (
        "import torch, sys; assert 'mosaic' not in sys.modules; x = torch.randn(3); "
        "f = torch.compile(lambda x: x.sin(), backend='mosaic', options={'inner': 'eager'}); "
        "assert torch.equal(f(x), x.sin()); assert 'mosaic' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_mosaic_starts_nothing() -> None:
    code = (
        "import mosaic, mosaic.runtime.mesh, sys, torch; "
        "assert not torch.distributed.is_initialized(); "
        "assert not torch.cuda.is_initialized(); "
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NAMES = {"x": "batch tokens features"}


def test_of_two_axes_on_one_mesh_axis_the_longer_is_cut() -> None:
    spec = ShardingSpec(inputs=NAMES, axes={"tokens": "ring", "features": "ulysses"})
    plan = mosaic.explain(cc.Mean(), X, spec=spec, sp_size=3)
    assert (plan.axis, plan.layout) == ("tokens", CUT)
    assert plan.notes == [
        "axis 'features' (8) stays whole: 'tokens' (13) is cut over mesh axis 'sp'"
    ]


def test_an_axis_on_two_mesh_axes() -> None:
    spec = ShardingSpec(inputs=NAMES, axes={"tokens": mosaic.Ring(mesh="a,b")})
    world = {"mesh_shape": (2, 3), "mesh_axes": ("a", "b"), "rank": 4}
    plan = mosaic.explain(cc.Mean(), X, spec=spec, **world)
    assert (plan.axis, plan.layout, plan.ranks) == ("tokens", "13=0:3|3:6|6:9|9:12|12:13|", 6)
