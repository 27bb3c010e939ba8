"""What the user asks for: names for the dims of inputs, a method for each axis, the contract."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mosaic.errors import ShardingError
from mosaic.methods import NAMED

PATH = re.compile(r"""[A-Za-z_]\w*|\[\s*(?:\d+|'[^']*'|"[^"]*")\s*\]|\.[A-Za-z_]\w*""")


@dataclass(frozen=True)
class ShardingSpec:
    """Which axes are cut, and how.

    inputs: names for the dims of arguments, ``{"x": "batch rows columns"}``. A key is a path as the
        user would write it: ``x``, ``src[0]``, ``batch["ids"]``.
    axes: a method for each named axis, ``{"rows": "ring", "columns": "local"}``; or, when the only
        tensor argument needs no names, for dims of it: ``{1: "ring", 2: "local"}``. Methods are
        those of ``mosaic.methods``; "local" leaves the axis whole. With neither inputs
        nor axes the longest attended axis is cut.
    inputs_are: "whole" on every rank, or "shards": the inputs that name a cut axis arrive as this
        rank's part, made by ``mosaic.shard_tensor`` or cut as ``torch.chunk`` does.
    outputs: "whole" (every rank has the single-device result) or "shards" (what holds the axis
        stays cut; ``mosaic.layout_of`` and ``mosaic.gather`` read it).
    on_gather: what to do with an op that has no exact local form: "warn" and run it whole on every
        rank, or "error".
    gradients: "whole" (the single-device gradient on every rank) or "shares" (the sum over the mesh
        axis is the gradient: for an outer reducer that sums over it).
    check_inputs: compare whole inputs and parameters across ranks on the "first" run of each graph,
        "always", or never (False).

    Raises ShardingError for names and methods that do not fit together.
    """

    inputs: Mapping[str, str] | None = None
    axes: Mapping[str | int, str] | None = None
    inputs_are: Literal["whole", "shards"] = "whole"
    outputs: Literal["whole", "shards"] = "whole"
    on_gather: Literal["warn", "error"] = "warn"
    gradients: Literal["whole", "shares"] = "whole"
    check_inputs: Literal["first", "always", False] = "first"
    mesh_axis: str = field(default="sp", kw_only=True)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ShardingError(
                    f"{name} = {getattr(self, name)!r} is not a choice",
                    fix=f"use one of {', '.join(map(repr, allowed))}",
                )
        for axis, method in (self.axes or {}).items():
            if method not in NAMED:
                raise ShardingError(
                    f"axis {axis!r}: there is no method {method!r}",
                    fix=f"use one of {', '.join(map(repr, NAMED))}",
                )
        self._check_names()

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
        if self.inputs_are == "shards" and not (self.inputs and self.sharded):
            raise ShardingError(
                "inputs arrive as shards, and nothing says along which axis",
                fix="name it: inputs={'x': 'batch rows features'}, axes={'rows': 'ring'}",
            )
        if len(self.sharded) > 1:
            raise ShardingError(
                "only one axis of a model can be cut for now",
                axes=", ".join(map(repr, self.sharded)),
                fix="give the others the method 'local'",
            )

    @property
    def sharded(self) -> dict[str | int, str]:
        """The axes to be cut, with their methods."""
        return {a: m for a, m in (self.axes or {}).items() if m != "local"}

    def __hash__(self) -> int:
        return hash(self.encode())

    def encode(self) -> str:
        """One line, for the digest that ranks compare."""
        parts = (f"{k}={dict(v) if isinstance(v, Mapping) else v!r}" for k, v in vars(self).items())
        return " ".join(parts)


CHOICES: dict[str, tuple[Any, ...]] = {
    "inputs_are": ("whole", "shards"),
    "outputs": ("whole", "shards"),
    "on_gather": ("warn", "error"),
    "gradients": ("whole", "shares"),
    "check_inputs": ("first", "always", False),
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
