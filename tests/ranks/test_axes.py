"""Several mesh axes, and two sharded axes in one model: exact, forward and every gradient."""

from __future__ import annotations

from math import prod

import axes_jobs as jobs
import pytest
from compare import assert_close, compare_gradients

from mosaic import AllGather, Method, Ring, ShardingSpec


def spec_of(**axes: Method | str) -> ShardingSpec:
    return ShardingSpec(inputs={"x": "batch rows columns"}, axes=axes, on_gather="error")


def check(ranks, name: str, spec: ShardingSpec, **mesh: int) -> None:
    want = jobs.run(name)
    shape, axes = tuple(mesh.values()), tuple(mesh)
    for got in ranks(prod(shape)).run(jobs.run, name, spec, shape, axes):
        assert_close("loss", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


@pytest.mark.parametrize("name", ["Flattened", "FlattenedCausal", "FlattenedMasked"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_flattened_axis(ranks, name: str, axis: str) -> None:
    """Columns are the inner factor: every rank holds a piece of every row."""
    check(ranks, name, spec_of(**{axis: Ring(mesh="s")}), s=3)


def test_an_axis_on_two_mesh_axes(ranks) -> None:
    check(ranks, "Flattened", spec_of(rows=AllGather(mesh="a,b")), a=2, b=2)
