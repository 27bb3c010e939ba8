"""What the user asks for: names for the dims of inputs, a method for each axis, the contract."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mosaic.api.buckets import Buckets, check_buckets
from mosaic.api.errors import ShardingError
from mosaic.api.methods import Local, Method, method_of

PATH = re.compile(r"""[A-Za-z_]\w*|\[\s*(?:\d+|'[^']*'|"[^"]*")\s*\]|\.[A-Za-z_]\w*""")


@dataclass(frozen=True)
class ShardingSpec:
    """Which axes are cut, and how.

    inputs: names for the dims of arguments, ``{"x": "batch rows columns"}``; "_" is no name, and
        may come twice. A key is a path as the user would write it: ``x``, ``src[0]``,
        ``batch["ids"]``.
    axes: a method for each named axis, ``{"rows": Ring(mesh="r"), "columns": "local"}``; or, when
        the only tensor argument needs no names, for dims of it: ``{1: "ring", 2: "local"}``. A
        string is the method with its defaults, on ``mesh_axis``; "local" leaves the axis whole.
        Axes on different mesh axes are cut at once. A tensor is cut over one mesh axis only once:
        of axes on the same one the longest is cut, the others stay whole, and the plan says so.
        With neither inputs nor axes the longest attended axis is cut.
    outputs: "whole" (every rank has the single-device result) or "shards" (what holds the axis
        stays cut: a ``mosaic.ShardedTensor``), or of some of them: ``{"logits": "shards"}``, by
        name or place. Where an input is a ShardedTensor, outputs stay cut unless they are named.
    on_gather: what to do with an op that has no exact local form: "warn" and run it whole on every
        rank, or "error".
    gradients: "whole" (the single-device gradient on every rank) or "shares" (of a parameter, the
        sum over the mesh axis is the gradient: for an outer reducer that sums over it, and does
        not average, as DistributedDataParallel does). Inputs' gradients are whole.
        The program must then be one graph, and no call may run eagerly.
    check_inputs: "always" (before every run of a graph whole inputs are compared across ranks, and
        which graph it is; before its first run parameters and buffers, too), "first" (both before
        the first run only), or False. One all-gather of half a kilobyte a run; a difference is an
        error before the run's results are given.
    mesh_axis: the mesh axis of methods given as strings, and of an axis that Mosaic finds itself.
    buckets: lengths of the axis that is cut, ``(1024, 2048)``, or "powers" (of two). Every input
        is padded to the next of them, and one program compiled for all lengths that are padded to
        one; results and gradients are those of the length itself. Where a program has no exact form
        for that, each length is compiled by itself, with a warning that says why.

    Raises ShardingError for names and methods that do not fit together.
    """

    inputs: Mapping[str, str] | None = None
    axes: Mapping[str | int, Method | str] | None = None
    outputs: Literal["whole", "shards"] | Mapping[str | int, str] = "whole"
    on_gather: Literal["warn", "error"] = "warn"
    gradients: Literal["whole", "shares"] = "whole"
    check_inputs: Literal["always", "first", False] = "always"
    mesh_axis: str = field(default="sp", kw_only=True)
    buckets: Buckets | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if name == "outputs" and isinstance(given, Mapping):
                check_outputs(given)
                continue
            if not isinstance(given, (str, bool)) or given not in allowed:
                raise ShardingError(
                    f"{name} = {given!r} is not a choice",
                    fix=f"use one of {', '.join(map(repr, allowed))}",
                )
        check_mappings(self.inputs, self.axes)
        if not isinstance(self.mesh_axis, str) or not self.mesh_axis:
            raise ShardingError(
                f"mesh_axis = {self.mesh_axis!r} is no name of a mesh axis",
                fix="use a name of mosaic.init's mesh, such as 'sp'",
            )
        if self.axes is not None:
            methods = {a: method_of(m, mesh=self.mesh_axis) for a, m in self.axes.items()}
            object.__setattr__(self, "axes", methods)
        self._check_names()
        check_buckets(self.buckets, len(self.sharded))
        if isinstance(self.buckets, list):
            object.__setattr__(self, "buckets", tuple(self.buckets))

    def _check_names(self) -> None:
        for path in self.inputs or {}:
            if not is_path(path):
                raise ShardingError(
                    f"{path!r} is not an argument path", fix="write it as x, src[0] or batch['ids']"
                )
        named = {name for dims in (self.inputs or {}).values() for name in dims.split()}
        for axis in self.axes or {}:
            if isinstance(axis, str) and axis not in named:
                raise ShardingError(
                    f"axis {axis!r} is named by no input",
                    inputs=", ".join(f"{k}: {v!r}" for k, v in (self.inputs or {}).items())
                    or "none",
                    fix=f"give the dim a name, as in inputs={{'x': 'batch {axis} features'}}",
                )

    @property
    def sharded(self) -> dict[str | int, Method]:
        """The axes to be cut, with their methods."""
        methods = {a: method_of(m) for a, m in (self.axes or {}).items()}
        return {a: m for a, m in methods.items() if not isinstance(m, Local)}

    @property
    def mesh(self) -> str:
        """Every mesh axis that takes part, as one long one."""
        names = [n for m in self.sharded.values() for n in m.mesh.replace(" ", "").split(",")]
        return ",".join(dict.fromkeys(names)) or self.mesh_axis

    @property
    def gives_shares(self) -> bool:
        """Whether gradients of parameters are shares, for an outer reducer to sum."""
        return self.gradients == "shares"

    def __hash__(self) -> int:
        return hash(self.encode())

    def encode(self) -> str:
        """One line, for the digest that ranks compare."""
        parts = (f"{k}={dict(v) if isinstance(v, Mapping) else v!r}" for k, v in vars(self).items())
        return " ".join(parts)


def check_outputs(given: Mapping[Any, Any]) -> None:
    """Raise ShardingError unless each output has a name, or a number, and a choice."""
    for name, choice in given.items():
        is_name = isinstance(name, int) or (isinstance(name, str) and is_path(name))
        if not is_name or choice not in CHOICES["outputs"]:
            raise ShardingError(
                f"outputs = {{{name!r}: {choice!r}}} says nothing of an output",
                fix='write outputs={"logits": "shards"}, or {0: "shards"} for the first of several',
            )


def check_mappings(inputs: object, axes: object) -> None:
    """Raise ShardingError unless they are what ShardingSpec says, each name once in an input."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ShardingError(
            f"inputs = {inputs!r} is no dict",
            fix="give names to the dims of arguments: inputs={'x': 'batch rows features'}",
        )
    if axes is not None and not isinstance(axes, Mapping):
        raise ShardingError(
            f"axes = {axes!r} is no dict",
            fix="give each axis a method: axes={'rows': 'ring'}, or axes={1: 'ring'} by its dim",
        )
    for path, dims in (inputs or {}).items():
        if not isinstance(dims, str):
            raise ShardingError(
                f"the names of input {path!r} are no string",
                names=repr(dims),
                fix="write them in one string, with spaces: 'batch rows features'",
            )
        odd = [name for name in dims.split() if not name.isidentifier()]
        if odd:
            raise ShardingError(
                f"{odd[0]!r} of input {path!r} is no name",
                names=repr(dims),
                fix="write a word for each dim, with spaces: 'batch rows features'",
            )
        counts = Counter(name for name in dims.split() if name != "_")
        twice = [name for name, n in counts.items() if n > 1]
        if twice:
            raise ShardingError(
                f"input {path!r} has the name {twice[0]!r} twice",
                names=repr(dims),
                fix="give each dim a name of its own, as in 'batch rows columns'",
            )
    for axis in axes or {}:
        if isinstance(axis, bool) or not isinstance(axis, (str, int)) or axis == "_":
            raise ShardingError(
                f"axis {axis!r} is neither a name nor the number of a dim",
                fix="write axes={'rows': 'ring'} with names, or axes={1: 'ring'} without",
            )
    kinds = {type(axis).__name__ for axis in axes or {}}
    if len(kinds) > 1:
        raise ShardingError(
            "axes are given by name and by the number of a dim",
            axes=", ".join(map(repr, axes or {})),
            fix="write axes={'rows': 'ring'} with names, or axes={1: 'ring'} without",
        )


CHOICES: dict[str, tuple[Any, ...]] = {
    "outputs": ("whole", "shards"),
    "on_gather": ("warn", "error"),
    "gradients": ("whole", "shares"),
    "check_inputs": ("always", "first", False),
}


def is_path(text: str) -> bool:
    return bool(text) and "".join(PATH.findall(text)) == text and text[0].isidentifier()


def path_parts(text: str) -> tuple[str, ...]:
    """``batch["ids"][0]`` -> ``("batch", "ids", "0")``."""
    return tuple(part.strip("[].'\" ") for part in PATH.findall(text))


def binds(path: str, source: str) -> bool:
    """Whether Dynamo's ``L['kwargs']['ids']`` is the user's ``ids``."""
    have, want = path_parts("L" + source.lstrip("LG"))[1:], path_parts(path)
    return have == want or have[1:] == want
