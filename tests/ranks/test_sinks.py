"""Sinks where an axis cuts rows, heads, or the keys of whole queries, against one process."""

from __future__ import annotations

import pytest
import sinks_jobs as jobs
from compare import assert_close, compare_gradients
from sampling import FULL

import mosaic

BOTH = {"rows": mosaic.Ring(mesh="r"), "columns": mosaic.AllGather(mesh="c")}


@pytest.mark.parametrize(
    "mesh, axes, shares",
    [
        ({"sp_size": 3}, {"rows": "ring"}, False),
        FULL({"sp_size": 2}, {"rows": "ring"}, True),
        FULL({"sp_size": 3}, {"columns": "all_gather"}, False),
        FULL({"mesh_shape": (2, 2), "mesh_axes": ("r", "c")}, BOTH, False),
    ],
)
def test_along_every_dim(ranks, mesh: dict, axes: dict, shares: bool) -> None:
    want = jobs.run({}, {})
    p = mesh.get("sp_size", 4)
    for got in ranks(p).run(jobs.run, mesh, axes, shares):
        assert_close("out", got["out"], want["out"], 1e-12)
        compare_gradients(want["gradients"], got["gradients"], 1e-12)
        assert got["masks"] == {"sinks"}
