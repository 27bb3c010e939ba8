"""Meshes under the fake process group: rank 1 of 4."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mosaic.runtime import mesh


@pytest.fixture
def world_of_4():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    if mesh.current_context() is not None:
        mesh.get_context().shutdown()
    dist.destroy_process_group()


def test_sp_is_innermost(world_of_4):
    context = mesh.init(sp_size=2)
    assert context.mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert (context.dp_rank, context.dp_size, context.rank(), context.size()) == (0, 2, 1, 2)
    assert context.device == torch.device("cpu")
    assert context.group_name() == context.group().group_name != ""
    assert mesh.init(sp_size=2) is context is mesh.get_context()


def test_none_takes_all_ranks(world_of_4):
    context = mesh.init(sp_size=None)
    assert (context.size("dp"), context.size("sp"), context.rank("sp")) == (1, 4, 1)


def test_named_axes(world_of_4):
    context = mesh.init(mesh_shape=(2, 2), mesh_axes=("rows", "columns"))
    assert context.axes == ("dp", "rows", "columns")
    assert [context.size(axis) for axis in context.axes] == [1, 2, 2]
    assert [context.rank(axis) for axis in context.axes] == [0, 0, 1]


def test_two_axes_as_one_long_one(world_of_4):
    context = mesh.init(mesh_shape=(2, 2), mesh_axes=("rows", "columns"))
    assert (context.size("rows,columns"), context.rank("rows,columns")) == (4, 1)
    group = context.group("rows,columns")
    assert dist.get_process_group_ranks(group) == [0, 1, 2, 3]
    assert context.group("columns, rows") is group  # always in the order of the mesh
    assert context.mesh["dp"].size() == 1


def test_ready_mesh(world_of_4):
    ready = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))
    context = mesh.init(sp_size=4, mesh=ready)
    assert context.mesh is ready
    assert (context.size(), context.rank(), context.dp_size, context.dp_rank) == (4, 1, 1, 0)


def test_a_world_that_shards_nothing_says_so(world_of_4, caplog):
    with caplog.at_level(logging.WARNING, "mosaic"):
        mesh.init()
    assert caplog.messages == ["sp_size = 1 in a world of 4 ranks: mosaic shards nothing"]


def test_shutdown_leaves_the_callers_group_open(world_of_4):
    mesh.init(sp_size=2).shutdown()
    assert mesh.current_context() is None and dist.is_initialized()


def test_a_world_of_one_needs_no_group():
    context = mesh.init()
    assert (context.mesh, context.group("sp"), context.group_name("sp")) == (None, None, "")
    assert (context.size(), context.rank(), context.dp_size, context.dp_rank) == (1, 0, 1, 0)
    context.shutdown()
    assert not dist.is_initialized()
