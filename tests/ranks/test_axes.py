"""Several mesh axes, and two sharded axes in one model: exact, forward and every gradient."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import axes_jobs as jobs
import pytest
from compare import assert_close, compare_gradients
from sampling import FULL

from mosaic import AllGather, Method, Ring, ShardingSpec, Ulysses


def spec_of(**axes: Method | str) -> ShardingSpec:
    return ShardingSpec(inputs={"x": "batch rows columns"}, axes=axes, on_gather="error")


def check(ranks, name: str, spec: ShardingSpec, **mesh: int) -> None:
    """``mesh``: the sizes of its axes."""
    want = jobs.run(name)
    shape, axes = tuple(mesh.values()), tuple(mesh)
    for got in ranks(prod(shape)).run(jobs.run, name, spec, shape, axes):
        assert_close("loss", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)
        compare_gradients(want["buffers"], got["buffers"], 1e-10)


@pytest.mark.parametrize("name", [FULL("Flattened"), FULL("FlattenedCausal"), "FlattenedMasked"])
@pytest.mark.parametrize("axis", [FULL("rows"), "columns"])
def test_a_flattened_axis(ranks, name: str, axis: str) -> None:
    """Columns are the inner factor: every rank holds a piece of every row."""
    check(ranks, name, spec_of(**{axis: Ring(mesh="s")}), s=3)


def test_an_axis_on_two_mesh_axes(ranks) -> None:
    check(ranks, "Flattened", spec_of(rows=AllGather(mesh="a,b")), a=2, b=2)


BOTH = spec_of(rows=Ring(mesh="r"), columns=AllGather(mesh="c"))
SIX = FULL(3)


@pytest.mark.parametrize("columns", [2, SIX])
@pytest.mark.parametrize("name", [FULL("InTurn"), FULL("InTurnFlat"), "Training", FULL("table")])
def test_two_axes(ranks, name: str, columns: int) -> None:
    """7 rows over 2 ranks, 5 columns over 2 or 3."""
    check(ranks, name, BOTH, r=2, c=columns)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Flattened", "FlattenedCausal", "FlattenedMasked"])
def test_two_axes_flattened(ranks, name: str) -> None:
    """One attention over all cells, its rows on one mesh axis and its columns on the other."""
    check(ranks, name, BOTH, r=2, c=2)


@pytest.mark.full
def test_the_mesh_in_the_other_order(ranks) -> None:
    check(ranks, "FlattenedMasked", BOTH, c=2, r=2)


THREE = ShardingSpec(
    inputs={"x": "batch times rows columns"},
    axes={"times": Ring(mesh="t"), "rows": AllGather(mesh="r"), "columns": Ulysses(mesh="c")},
    on_gather="error",
)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Video", "Volume"])
def test_three_axes(ranks, name: str) -> None:
    """3 times, 4 rows, 5 columns, each over 2 ranks; rows and columns flattened, or all three."""
    check(ranks, name, THREE, t=2, r=2, c=2)


@pytest.mark.parametrize("name", ["Video", FULL("Volume")])
def test_three_axes_of_which_two_have_one_rank(ranks, name: str) -> None:
    """A rank then has a single time; nothing of that may be taken for another axis's dim."""
    check(ranks, name, THREE, c=1, t=3, r=1)


def test_both_axes_arrive_and_stay_cut(ranks) -> None:
    for rank, got in enumerate(ranks(4).run(jobs.from_shards_to_shards, 7, 6)):
        rows, columns = (4, 3)[rank // 2], 3
        assert got["size"] == [2, rows, columns, 8]
        assert got["layouts"] == ["7=0:4|4:7", "6=0:3|3:6"]
        assert got["error"] < 1e-10


@pytest.mark.full
def test_one_of_two_axes_on_two_mesh_axes(ranks) -> None:
    spec = spec_of(rows=Ring(mesh="a,b"), columns=Ring(mesh="c"))
    check(ranks, "InTurnFlat", spec, a=2, c=2, b=1)
    check(ranks, "Flattened", spec, a=2, c=1, b=2)


@pytest.mark.full
def test_dropout_does_not_depend_on_the_mesh(ranks) -> None:
    want = ranks(1).run(jobs.run, "Dropped", BOTH, (1, 1), ("r", "c"))[0]
    for got in ranks(4).run(jobs.run, "Dropped", BOTH, (2, 2), ("r", "c")):
        assert_close("loss", got["loss"], want["loss"], 1e-10)
        compare_gradients(want["gradients"], got["gradients"], 1e-10)


@pytest.mark.parametrize(
    "spec, mesh",
    [(spec_of(rows=Ring(mesh="s")), {"s": 3}), FULL(BOTH, {"r": 2, "c": 2})],
    ids=["rows", "both"],
)
def test_whole_queries_and_sharded_keys(ranks, spec: ShardingSpec, mesh: dict[str, int]) -> None:
    check(ranks, "Latents", spec, **mesh)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Everything", "tokens"])
def test_what_meets_along_both_axes(ranks, name: str) -> None:
    check(ranks, name, BOTH, r=2, c=3)


@pytest.mark.full
def test_what_works_along_both_axes(ranks) -> None:
    check(ranks, "Along", BOTH, r=2, c=2)


@pytest.mark.parametrize("name", [FULL("Structured"), "FlattenedStructured"])
def test_masks_made_by_tiles(ranks, name: str) -> None:
    """Windows, documents and learned biases along both axes."""
    check(ranks, name, BOTH, r=2, c=2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Structured", "FlattenedStructured"])
def test_masks_made_by_tiles_along_one_axis(ranks, name: str) -> None:
    check(ranks, name, spec_of(rows=Ring(mesh="s")), s=3)
    check(ranks, name, spec_of(rows=AllGather(mesh="r"), columns=Ring(mesh="c")), r=1, c=3)


@pytest.mark.full
def test_a_users_function_runs_whole(ranks) -> None:
    check(ranks, "UsersFunction", replace(BOTH, on_gather="warn"), r=2, c=2)


@pytest.mark.full
def test_too_many_pieces_for_a_causal_mask_are_gathered(ranks) -> None:
    check(ranks, "ManyRows", replace(BOTH, on_gather="warn"), r=2, c=2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["InTurnFlat", "Everything"])
def test_gradients_may_stay_shares(ranks, name: str) -> None:
    """Their sum over the ranks of both axes is the gradient."""
    check(ranks, name, replace(BOTH, gradients="shares"), r=2, c=2)
