"""Which ranks there are: a context over torch's DeviceMesh.

>>> import mosaic
>>> context = mosaic.init()  # a world of one needs no process group
>>> context.size("sp"), context.rank("sp"), context.group_name("sp")
(1, 0, '')
>>> context.shutdown()
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mosaic.api.errors import ShardingError
from mosaic.runtime import watch
from mosaic.runtime.rendezvous import introduce
from mosaic.torch_private import flattened, reset_dynamo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    """What ``init`` was asked for, in one form, so that two calls can be compared."""

    sp_size: int | None
    mesh_shape: tuple[int, ...] | None
    mesh_axes: tuple[str, ...] | None
    mesh: DeviceMesh | None
    device: torch.device | None

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in given.items())


@dataclass(frozen=True)
class MosaicContext:
    """The ranks of this run.

    A mesh axis may be a joint one: ``"a,b"`` is one long axis of size_a x size_b ranks, in the
    order of the mesh whichever way it is written: rank = index_a * size_b + index_b.
    """

    device: torch.device
    axes: tuple[str, ...]
    _request: _Request = field(repr=False)
    _owns_group: bool = field(repr=False)
    alike: set[object] = field(repr=False, compare=False, default_factory=set)  # compared texts
    ledgers: dict[Any, Any] = field(repr=False, compare=False, default_factory=dict)  # data_check's
    programs: dict[Any, Any] = field(repr=False, compare=False, default_factory=dict)  # eagerly's
    _meshes: dict[tuple[str, ...], DeviceMesh] = field(repr=False, default_factory=dict)

    @property
    def mesh(self) -> DeviceMesh | None:
        """None where there is a single process, and after ``shutdown``."""
        return self._meshes.get(())

    def size(self, mesh_axis: str = "sp") -> int:
        """How many ranks the mesh axis has."""
        names = self._names(mesh_axis)
        mesh = self.mesh
        return 1 if mesh is None else math.prod(mesh.size(self.axes.index(n)) for n in names)

    def rank(self, mesh_axis: str = "sp") -> int:
        """This process's place along the mesh axis."""
        rank = 0
        for name in self._names(mesh_axis):
            rank = rank * self.size(name)
            rank += 0 if self.mesh is None else self.mesh.get_local_rank(name)
        return rank

    def position(self, mesh_axis: str) -> int:
        """Where a (joint) mesh axis begins among those of the mesh."""
        return self.axes.index(self._names(mesh_axis)[0])

    def group(self, mesh_axis: str = "sp") -> dist.ProcessGroup | None:
        """The process group of the mesh axis; None where there is a single process.

        That of a joint axis is made when it is first asked for, which all ranks must do.
        """
        names = self._names(mesh_axis)
        if self.mesh is None or len(names) == 1:
            return None if self.mesh is None else self.mesh.get_group(names[0])
        if names not in self._meshes:
            self._meshes[names] = flattened(self.mesh, names)
        return self._meshes[names].get_group()

    def group_name(self, mesh_axis: str = "sp") -> str:
        """The name by which functional collectives find the group; "" for a single process."""
        group = self.group(mesh_axis)
        return "" if group is None else group.group_name

    @property
    def dp_size(self) -> int:
        return self.size("dp") if "dp" in self.axes else 1

    @property
    def dp_rank(self) -> int:
        return self.rank("dp") if "dp" in self.axes else 0

    def shutdown(self) -> None:
        """Forget this context, and close torch.distributed if ``init`` opened it."""
        global _context
        if _context is self:
            _context = None
        watch.stop()
        reset_dynamo()  # what was compiled for these ranks is not for others
        if not dist.is_initialized():
            return
        if self._owns_group:
            dist.destroy_process_group()
        elif self.mesh is not self._request.mesh and self.device.type == "cpu":
            for group in self._own_groups():
                dist.destroy_process_group(group)
            self._meshes.clear()  # what was compiled may live on, and this context with it
            gc.collect()  # a mesh refers to itself, and with it to its groups

    def _own_groups(self) -> list[dist.ProcessGroup]:
        """The groups that were made for this context: each of gloo has threads that keep waking."""
        names = [*self.axes, *(",".join(axes) for axes in self._meshes if axes)]
        groups = [group for name in names if (group := self.group(name)) is not None]
        return [g for g in groups if g is not dist.group.WORLD]

    def _names(self, mesh_axis: str) -> tuple[str, ...]:
        """The mesh's own axes that a (joint) mesh axis is made of, in the order of the mesh."""
        wanted = [name.strip() for name in mesh_axis.split(",")]
        for name in wanted:
            if name not in self.axes:
                raise ShardingError(
                    f"there is no mesh axis '{name}'",
                    axes=", ".join(self.axes),
                    fix="use one of these, or name yours in "
                    "mosaic.init(mesh_shape=..., mesh_axes=...)",
                )
        return tuple(name for name in self.axes if name in wanted)


def check_sizes(sp_size: object, mesh_shape: object, mesh_axes: object) -> None:
    """Raise ShardingError for what are no numbers of ranks, and no names of mesh axes."""
    if mesh_shape is not None and not _is_list(mesh_shape):
        raise ShardingError(
            f"mesh_shape = {mesh_shape!r} is no list of sizes",
            fix="give a size for each mesh axis: mesh_shape=(2, 2)",
        )
    if mesh_axes is not None and not (_is_list(mesh_axes) and all(map(_is_name, mesh_axes))):
        raise ShardingError(
            f"mesh_axes = {mesh_axes!r} are no names of mesh axes",
            fix='give a word for each mesh axis: mesh_axes=("rows", "columns")',
        )
    for name, given, sizes in (
        ("sp_size", sp_size, () if sp_size is None else (sp_size,)),
        ("mesh_shape", mesh_shape, mesh_shape or ()),
    ):
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise ShardingError(
                f"{name} = {given!r} is no number of ranks",
                fix="every size is 1 or more; sp_size=None takes all ranks",
            )


def _is_list(given: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _is_name(given: object) -> bool:
    """A comma joins mesh axes, and a space ends one where a graph names it."""
    return isinstance(given, str) and re.fullmatch(r"[^\s,]+", given) is not None


def checked_device(device: object) -> torch.device:
    """Raise ShardingError for what names no device."""
    try:
        return torch.device(device)  # type: ignore[call-overload,no-any-return]
    except (RuntimeError, TypeError):
        raise ShardingError(
            f"device = {device!r} is no device of torch", fix="use 'cuda' or 'cpu'"
        ) from None


_context: MosaicContext | None = None


def init(
    sp_size: int | None = 1,
    *,
    mesh_shape: Sequence[int] | None = None,
    mesh_axes: Sequence[str] | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
) -> MosaicContext:
    """Say how the ranks are arranged; call it once on every rank.

    ``init(sp_size=4)`` in a world of 8 makes the mesh ("dp", "sp") of 2 x 4, neighbours along sp;
    ``sp_size=None`` takes all ranks. ``mesh_shape=(2, 2), mesh_axes=("rows", "columns")`` names
    other axes, with dp in front for what is left of the world. ``mesh`` is a mesh made elsewhere.
    torch.distributed is opened from torchrun's environment where the caller has not opened it.

    Raises ShardingError where sizes, names and the world do not fit.
    """
    global _context
    request = _request(sp_size, mesh_shape, mesh_axes, mesh, device)
    if _context is None:
        _context = _make(request)
        reset_dynamo()  # what was compiled for a world of one is not for these ranks
    elif _context._request != request:
        raise ShardingError(
            "mosaic.init was called before, with other arguments",
            before=_context._request,
            now=request,
            fix="call mosaic.get_context().shutdown() first",
        )
    return _context


@contextmanager
def pretended(
    sp_size: int | None, mesh_shape: Sequence[int] | None, mesh_axes: Sequence[str] | None
) -> Iterator[None]:
    """``init`` for the time of a plan. Nothing is compiled for these ranks that could be run later,
    so that Dynamo keeps what it has compiled."""
    global _context
    _context = _make(_request(sp_size, mesh_shape, mesh_axes))
    try:
        yield
    finally:
        _context = None


def _request(
    sp_size: int | None,
    mesh_shape: Sequence[int] | None,
    mesh_axes: Sequence[str] | None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
) -> _Request:
    check_sizes(sp_size, mesh_shape, mesh_axes)
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise ShardingError(
            f"mesh = {mesh!r} is no DeviceMesh",
            fix='pass a DeviceMesh, or mesh_shape=(2, 2) and mesh_axes=("rows", "columns")',
        )
    return _Request(
        sp_size,
        None if mesh_shape is None else tuple(mesh_shape),
        None if mesh_axes is None else tuple(mesh_axes),
        mesh,
        None if device is None else checked_device(device),
    )


def current_context() -> MosaicContext | None:
    """The context that ``init`` made, if it was called."""
    return _context


def get_context() -> MosaicContext:
    """The context that ``init`` made."""
    if _context is None:
        raise ShardingError(
            "mosaic.init was not called", fix="call mosaic.init(sp_size=...) on every rank first"
        )
    return _context


def context_or_world_of_one() -> MosaicContext | None:
    """The context, or None for a single process that has not called ``init``."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if _context is None and (several or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise ShardingError(
            "there are several ranks, and Mosaic does not know which belong together",
            fix="call mosaic.init(sp_size=...) on every rank first",
        )
    return _context


@atexit.register
def _end_gloo_threads() -> None:
    """Let the worker threads of gloo end before the interpreter does.

    The mesh keeps them alive, and one that frees a tensor too late aborts the process. Groups of
    NCCL stay as they are: to close them on one failed rank alone could wait for the others.
    """
    if _context is not None and _context.device.type == "cpu":
        if hasattr(sys, "last_value"):  # the process ends in an error
            watch.look_once_more()
        _context.shutdown()
        gc.collect()  # a mesh refers to itself


# --- making a context --------------------------------------------------------------------------


def _make(request: _Request) -> MosaicContext:
    world = _world_size()
    axes, shape = _ready_mesh(request) if request.mesh is not None else _shape(request, world)
    device = _device(request.device, world)
    if world == 1:
        return MosaicContext(device, axes, request, _owns_group=False)
    owns_group = not dist.is_initialized()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if owns_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = request.mesh or init_device_mesh(device.type, shape, mesh_dim_names=axes)
    introduce()
    context = MosaicContext(device, axes, request, owns_group, _meshes={(): mesh})
    if "sp" in axes and context.size("sp") == 1 and math.prod(shape) == context.dp_size:
        log.warning("sp_size = 1 in a world of %d ranks: mosaic shards nothing", world)
    return context


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def _shape(request: _Request, world: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names and sizes of the mesh to make, dp first."""
    axes, shape, title = _asked(request, world)
    ranks = math.prod(shape)
    if world == 1 and ranks > 1:
        raise ShardingError(
            f"{title} needs {ranks} ranks, and this process is alone",
            sizes=f"{ranks} ranks wanted, world = 1",
            fix=f"start it with torchrun --nproc-per-node={ranks} your_script.py",
        )
    if "dp" in axes and ranks != world:
        raise ShardingError(
            f"{title} with 'dp' in it does not fill the world of {world} ranks",
            sizes=f"{ranks} ranks wanted, world = {world}",
            fix="leave 'dp' out: it takes what is left of the world",
        )
    if world % ranks:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ShardingError(
            f"{title} does not divide the world of {world} ranks",
            sizes=f"{ranks} ranks wanted, {world} = {world // ranks} x {ranks} + {world % ranks}",
            fix=f"use one of {divisors}, or start a multiple of {ranks} ranks",
        )
    if "dp" in axes:
        return axes, shape
    return ("dp", *axes), (world // ranks, *shape)


def _asked(request: _Request, world: int) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Names, sizes and the words for them in messages."""
    axes, shape = request.mesh_axes, request.mesh_shape
    if axes is None and shape is None:
        size = world if request.sp_size is None else request.sp_size
        return ("sp",), (size,), f"sp_size = {size}"
    _check_no_sp_size(request, "mesh_shape", shape)
    if not axes or not shape or len(axes) != len(shape) or len(set(axes)) != len(axes):
        raise ShardingError(
            "mesh_shape and mesh_axes do not fit",
            mesh_shape=shape,
            mesh_axes=axes,
            fix="give one size and one name for each axis, each name once",
        )
    return axes, shape, f"mesh_shape = {shape}"


def _ready_mesh(request: _Request) -> tuple[tuple[str, ...], tuple[int, ...]]:
    assert request.mesh is not None
    names, shape = request.mesh.mesh_dim_names or (), tuple(request.mesh.shape)
    if request.mesh_shape is not None:
        raise ShardingError(
            "mesh and mesh_shape were both given", fix="give the mesh alone, it has a shape"
        )
    missing = [axis for axis in request.mesh_axes or () if axis not in names]
    if missing or not names:
        raise ShardingError(
            f"the mesh has no axis '{missing[0]}'" if missing else "the mesh has no axis names",
            mesh=f"{shape} of {names}",
            fix='name its axes: init_device_mesh(..., mesh_dim_names=("dp", "sp"))',
        )
    if "sp" not in names or request.sp_size != shape[names.index("sp")]:
        _check_no_sp_size(request, "mesh", f"{shape} of {names}")
    return names, shape


def _check_no_sp_size(request: _Request, name: str, given: object) -> None:
    if request.sp_size not in (None, 1):  # 1 is the default: nothing was said
        facts: dict[str, Any] = {name: given}
        raise ShardingError(
            f"sp_size = {request.sp_size} and {name} were both given",
            fix=f"leave sp_size out: {name} says how many ranks each axis has",
            **facts,
        )


def _device(wanted: torch.device | None, world: int) -> torch.device:
    """The device of this rank: by its place on its host, never by its place in the world."""
    kind = wanted.type if wanted is not None else _default_kind()
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and ((wanted and wanted.index) or 0) >= count:
        raise ShardingError(
            f"there is no device {str(wanted or kind)!r}",
            sizes=f"{count} GPUs on this host",
            fix="use a GPU that torch sees, or mosaic.init(..., device='cpu')",
        )
    if kind != "cuda" or (wanted is not None and wanted.index is not None):
        return wanted or torch.device(kind)
    if world == 1 or "LOCAL_RANK" not in os.environ:
        return torch.device("cuda", torch.cuda.current_device())  # whatever the caller has chosen
    local = int(os.environ["LOCAL_RANK"])
    if count == 1:  # launchers that show every rank its own GPU only
        return torch.device("cuda", 0)
    if local >= count:
        raise ShardingError(
            f"there is no GPU for local rank {local}",
            sizes=f"{count} GPUs on this host",
            fix=f"start at most {count} ranks per host, or use mosaic.init(..., device='cpu')",
        )
    return torch.device("cuda", local)


def _default_kind() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    if dist.is_initialized() and "nccl" not in str(dist.get_backend_config()):
        return "cpu"  # a gloo or fake group, opened by the caller
    return "cuda"
