"""Which ranks share a mesh axis, and which of them this is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

from mosaic.runtime.mesh import MosaicContext


@dataclass(frozen=True)
class World:
    """The ranks of one mesh axis (or of several as one), and which of them this is."""

    size: int
    rank: int
    group: str
    mesh_axis: str = "sp"
    sizes: Mapping[str, int] = field(default_factory=dict)  # of all mesh axes, in their order

    def along(self, mesh_axes: Sequence[str]) -> list[tuple[int, ...]]:
        """For each rank its ranks along several (joint) mesh axes that make up this one."""
        mine = own_axes(self.mesh_axis)
        sizes = {name: n for name, n in self.sizes.items() if name in mine}

        def rank_along(mesh_axis: str, place: tuple[int, ...]) -> int:
            rank = 0
            for index, (name, size) in zip(place, sizes.items(), strict=True):
                rank = rank * size + index if name in own_axes(mesh_axis) else rank
            return rank

        places = product(*map(range, sizes.values()))
        return [tuple(rank_along(axis, place) for axis in mesh_axes) for place in places]

    def position(self, mesh_axis: str) -> int:
        """Where a (joint) mesh axis begins among those of the mesh."""
        return min(map(list(self.sizes).index, own_axes(mesh_axis)))

    @property
    def node_size(self) -> int:
        """How many neighbouring ranks share a node, by torchrun's word; 0 for all of them."""
        names = list(self.sizes)
        inner = names[names.index(self.mesh_axis) + 1 :] if self.mesh_axis in names else []
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        return local // math.prod(self.sizes[name] for name in inner)


def world_of(ranks: MosaicContext | None, mesh_axis: str) -> World:
    """The ranks of a mesh axis; None is a process that is alone."""
    sizes = {} if ranks is None else {name: ranks.size(name) for name in ranks.axes}
    if ranks is None or ranks.size(mesh_axis) == 1:
        return World(1, 0, "", mesh_axis, sizes)
    group = ranks.group_name(mesh_axis)
    return World(ranks.size(mesh_axis), ranks.rank(mesh_axis), group, mesh_axis, sizes)


def device_memory() -> int:
    """Of a GPU, in bytes, the same on every rank; 0 on the CPU, where it is not the limit."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def own_axes(mesh_axis: str) -> set[str]:
    """The mesh's own axes in a joint one."""
    return {name.strip() for name in mesh_axis.split(",")}
