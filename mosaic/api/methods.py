"""How one attention is done across the ranks: what users write in a spec or pass to a module.

A method is a frozen dataclass whose mesh axis is a keyword; its name in small letters is the method
with its defaults: ``"ring"`` is ``Ring()``. What each one moves is in ``attention/schedule.py``,
what it costs in ``attention/cost.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from mosaic.api.errors import ShardingError

Intra = Literal["local", "ring", "ulysses", "mesh2d"]
Inter = Literal["ring", "mesh2d"]


@dataclass(frozen=True)
class Method:
    """What all methods share. ``mesh``: the mesh axis; ``"a,b"`` takes two as one long axis."""

    mesh: str = field(default="sp", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, str) or not self.mesh:
            raise ShardingError(
                f"{type(self).__name__}(mesh={self.mesh!r}) is no name of a mesh axis",
                fix='use a name, such as mesh="sp", or mesh="a,b" for two as one',
            )


@dataclass(frozen=True)
class Local(Method):
    """The axis stays whole on every rank; nothing is sent."""


@dataclass(frozen=True)
class Auto(Method):
    """The quickest method that is exact here and fits into memory, by ``attention/timing.py``."""


@dataclass(frozen=True)
class Ring(Method):
    """Keys and values visit, and queries stay (Liu et al., "Ring Attention", 2023).

    stages: in how many portions the keys come. p: one rank's at a time, the least memory. 1: all at
        once, the fewest merges. Between: this rank's own first, then the others' in groups.
    grad_dtype: in which dK and dV go home, a dtype or its name; None is the dtype of K. They are
        added up in float32 (float64 for float64) whatever it is: a wider one, such as float32 for
        bfloat16, saves a rounding, and one narrower than K's rounds each rank's share to it.
    """

    stages: int | Literal["auto"] = field(default="auto", kw_only=True)
    grad_dtype: torch.dtype | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grad_dtype", _dtype_of("Ring", "grad_dtype", self.grad_dtype))
        whole = isinstance(self.stages, int) and not isinstance(self.stages, bool)
        if self.stages != "auto" and not (whole and self.stages >= 1):
            raise ShardingError(
                f"Ring(stages={self.stages!r}) is no number of stages",
                fix='use "auto" or a number from 1 to the ranks of the mesh axis',
            )


@dataclass(frozen=True)
class AllGather(Method):
    """All keys and values at once: ``Ring(stages=1)``."""


@dataclass(frozen=True)
class Mesh2D(Method):
    """Tiles of the score matrix on a grid of ranks, rank = row * cols + col.

    The ``cols`` ranks of a row gather their queries, the ``rows`` ranks of a column their keys and
    values; each rank computes one tile, and partial outputs go home with their log-sum-exp. What a
    rank sends grows with sqrt(p), not with p ("Mesh-Attention", arXiv 2512.20968).
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts("Mesh2D", rows=self.rows, cols=self.cols)


@dataclass(frozen=True)
class Ulysses(Method):
    """Heads are cut instead of the sequence: one all-to-all before and one after (Jacobs et al.,
    "DeepSpeed Ulysses", 2023). Fewer KV heads than ranks are sent to several ranks; heads that do
    not divide leave the rest of the ranks to a ring."""


@dataclass(frozen=True)
class Hierarchical(Method):
    """Nodes of ``intra_node_size`` neighbouring ranks: ``intra`` inside a node, ``inter`` between
    nodes ("double ring", LoongTrain, 2024). Each rank sends (nodes - 1) x its K and V across nodes.

    intra: "local" gathers K and V inside the node, "ring" passes them round, "ulysses" cuts heads
        inside it, "mesh2d" has a grid inside it, as square as it goes.
    inter: "ring" or "mesh2d".
    """

    intra_node_size: int
    intra: Intra = "local"
    inter: Inter = "ring"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts("Hierarchical", intra_node_size=self.intra_node_size)
        _check_choice("Hierarchical", "intra", self.intra, get_args(Intra))
        _check_choice("Hierarchical", "inter", self.inter, get_args(Inter))


@dataclass(frozen=True)
class Composed(Method):
    """Ulysses over one mesh axis, another method over a second one; the tensor's axis is cut over
    both. ``mesh`` follows from the two."""

    heads: Ulysses = field(default_factory=lambda: Ulysses(mesh="heads"))
    sequence: Ring | AllGather | Mesh2D = field(default_factory=Ring)
    mesh: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(self.heads, Ulysses):
            raise ShardingError(
                "Composed(heads=...) takes a mosaic.Ulysses",
                heads=self.heads,
                fix="write it as heads=mosaic.Ulysses(mesh='heads')",
            )
        if not isinstance(self.sequence, (Ring, AllGather, Mesh2D)):
            raise ShardingError(
                "Composed(sequence=...) takes a mosaic.Ring, AllGather or Mesh2D",
                sequence=self.sequence,
                fix="write it as sequence=mosaic.Ring(mesh='sequence')",
            )
        if self.heads.mesh == self.sequence.mesh:
            raise ShardingError(
                "Composed needs two mesh axes",
                heads=self.heads.mesh,
                sequence=self.sequence.mesh,
                fix='name them: Composed(heads=Ulysses(mesh="h"), sequence=Ring(mesh="s"))',
            )
        object.__setattr__(self, "mesh", f"{self.heads.mesh},{self.sequence.mesh}")


@dataclass(frozen=True)
class Folded(Method):
    """A ``Composed`` whose two mesh axes lie in one, ``mesh``: its ranks are a grid of ``shape``
    = (heads, sequence), rank = number along heads * sequence + number along sequence."""

    composed: Composed
    shape: tuple[int, int]


def _check_counts(name: str, **counts: int) -> None:
    for what, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ShardingError(
                f"{name}({what}={count!r}) is no number of ranks", fix="use 1 or more"
            )


def _check_choice(name: str, what: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ShardingError(
            f"{name}({what}={given!r}) is not a choice",
            fix=f"use one of {', '.join(map(repr, allowed))}",
        )


def _dtype_of(name: str, what: str, given: object) -> torch.dtype | None:
    """A floating dtype from itself or its name."""
    named = given.removeprefix("torch.") if isinstance(given, str) else given
    for dtype in GRADIENTS:
        if named in (dtype, str(dtype).removeprefix("torch.")):
            return dtype
    if given is None:
        return None
    raise ShardingError(
        f"{name}({what}={given!r}) is no dtype of a gradient",
        fix=f"use {', '.join(map(str, GRADIENTS))}, or None for that of K",
    )


#: In which dK and dV can be sent.
GRADIENTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Methods that a string can name; the others have to be told sizes.
NAMED: Mapping[str, type[Method]] = {
    "auto": Auto,
    "local": Local,
    "ring": Ring,
    "all_gather": AllGather,
    "ulysses": Ulysses,
}
#: Methods that need numbers, and how to write them.
SIZED = {
    "mesh2d": "mosaic.Mesh2D(rows, cols)",
    "hierarchical": "mosaic.Hierarchical(intra_node_size)",
    "composed": 'mosaic.Composed(heads=mosaic.Ulysses(mesh="h"), sequence=mosaic.Ring(mesh="s"))',
}


def method_of(given: Any, *, mesh: str = "sp") -> Method:
    """A method object from what a user wrote. Raises ShardingError for anything else."""
    if isinstance(given, Method):
        return given
    if isinstance(given, str) and given in NAMED:
        return replace(NAMED[given](), mesh=mesh)
    if isinstance(given, str) and given in SIZED:
        raise ShardingError(f"{given!r} needs sizes", fix=f"write it as {SIZED[given]}")
    raise ShardingError(
        f"there is no method {given!r}",
        fix=f"use one of {', '.join(map(repr, NAMED))}, or an object such as mosaic.Mesh2D(2, 2)",
    )


#: The methods that have been asked for, by what stands for them in a graph.
_known: dict[str, Method] = {}


@torch.compiler.assume_constant_result
def key_of(method: str | Method) -> str:
    """A string by which a method goes into a graph; modules keep it, as Dynamo of torch 2.11 takes
    no frozen dataclass for a constant."""
    if isinstance(method, str) and method in _known:
        return method
    found = method_of(method)
    _known[repr(found)] = found
    return repr(found)


def method_named(key: str) -> Method:
    """The method of a key that ``key_of`` gave."""
    return _known[key]
