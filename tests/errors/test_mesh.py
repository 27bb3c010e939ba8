"""Whole texts of what mosaic.runtime.mesh refuses."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mosaic.api.errors import ShardingError
from mosaic.runtime import mesh


@pytest.fixture
def no_context(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if mesh.current_context() is not None:
        mesh.get_context().shutdown()


@pytest.fixture
def world_of_4(no_context):
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def refusal(fn, *args, **kwargs) -> str:
    with pytest.raises(ShardingError) as caught:
        fn(*args, **kwargs)
    return "\n" + str(caught.value)


def test_sp_size_does_not_divide_the_world(world_of_4):
    assert (
        refusal(mesh.init, sp_size=3)
        == """
sp_size = 3 does not divide the world of 4 ranks
  sizes  3 ranks wanted, 4 = 1 x 3 + 1
  fix    use one of 1, 2, 4, or start a multiple of 3 ranks"""
    )


def test_mesh_shape_does_not_divide_the_world(world_of_4):
    assert (
        refusal(mesh.init, mesh_shape=(3, 2), mesh_axes=("rows", "columns"))
        == """
mesh_shape = (3, 2) does not divide the world of 4 ranks
  sizes  6 ranks wanted, 4 = 0 x 6 + 4
  fix    use one of 1, 2, 4, or start a multiple of 6 ranks"""
    )


def test_mesh_shape_with_dp_must_fill_the_world(world_of_4):
    assert (
        refusal(mesh.init, mesh_shape=(1, 2), mesh_axes=("dp", "sp"))
        == """
mesh_shape = (1, 2) with 'dp' in it does not fill the world of 4 ranks
  sizes  2 ranks wanted, world = 4
  fix    leave 'dp' out: it takes what is left of the world"""
    )


def test_no_ranks_to_shard_over(no_context):
    assert (
        refusal(mesh.init, sp_size=4)
        == """
sp_size = 4 needs 4 ranks, and this process is alone
  sizes  4 ranks wanted, world = 1
  fix    start it with torchrun --nproc-per-node=4 your_script.py"""
    )


def test_no_number_of_ranks(no_context):
    assert (
        refusal(mesh.init, sp_size=0)
        == """
sp_size = 0 is no number of ranks
  fix  every size is 1 or more; sp_size=None takes all ranks"""
    )


def test_two_different_inits(no_context):
    context = mesh.init()
    assert mesh.init(sp_size=1) is context
    assert (
        refusal(mesh.init, sp_size=None, device="cpu")
        == """
mosaic.init was called before, with other arguments
  before  sp_size=1
  now     device=cpu
  fix     call mosaic.get_context().shutdown() first"""
    )
    context.shutdown()
    assert mesh.init(sp_size=None, device="cpu") is not context


def test_get_context_before_init(no_context):
    assert mesh.current_context() is None
    assert (
        refusal(mesh.get_context)
        == """
mosaic.init was not called
  fix  call mosaic.init(sp_size=...) on every rank first"""
    )


def test_unknown_mesh_axis(world_of_4):
    assert (
        refusal(mesh.init(sp_size=2).size, "tp")
        == """
there is no mesh axis 'tp'
  axes  dp, sp
  fix   use one of these, or name yours in mosaic.init(mesh_shape=..., mesh_axes=...)"""
    )


def test_mesh_shape_without_names(world_of_4):
    assert (
        refusal(mesh.init, mesh_shape=(2, 2))
        == """
mesh_shape and mesh_axes do not fit
  mesh_shape  (2, 2)
  mesh_axes   None
  fix         give one size and one name for each axis, each name once"""
    )


def test_sp_size_beside_mesh_shape(world_of_4):
    assert (
        refusal(mesh.init, 2, mesh_shape=(2, 2), mesh_axes=("rows", "columns"))
        == """
sp_size = 2 and mesh_shape were both given
  mesh_shape  (2, 2)
  fix         leave sp_size out: mesh_shape says how many ranks each axis has"""
    )


def test_sp_size_against_a_ready_mesh(world_of_4):
    ready = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "sp"))
    assert (
        refusal(mesh.init, sp_size=2, mesh=ready)
        == """
sp_size = 2 and mesh were both given
  mesh  (1, 4) of ('dp', 'sp')
  fix   leave sp_size out: mesh says how many ranks each axis has"""
    )


def test_ready_mesh_without_the_axis(world_of_4):
    ready = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    assert (
        refusal(mesh.init, mesh=ready, mesh_axes=("columns",))
        == """
the mesh has no axis 'columns'
  mesh  (2, 2) of ('dp', 'sp')
  fix   name its axes: init_device_mesh(..., mesh_dim_names=("dp", "sp"))"""
    )


def test_ready_mesh_without_names(world_of_4):
    assert (
        refusal(mesh.init, mesh=init_device_mesh("cpu", (4,)))
        == """
the mesh has no axis names
  mesh  (4,) of ()
  fix   name its axes: init_device_mesh(..., mesh_dim_names=("dp", "sp"))"""
    )


def test_a_device_that_torch_does_not_know(no_context):
    assert (
        refusal(mesh.init, device="gpu")
        == """
device = 'gpu' is no device of torch
  fix  use 'cuda' or 'cpu'"""
    )
