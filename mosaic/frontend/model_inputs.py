"""The named inputs of a model: compared across ranks, and cut, before its forward sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec, path_parts
from mosaic.frontend.data_check import DataCheck
from mosaic.frontend.deferred import pattern
from mosaic.frontend.unit_lengths import layout_of
from mosaic.graph.inputs import Input
from mosaic.layout import Layout
from mosaic.partition.values import Axis
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.sharded_tensor import ShardedTensor, distribute

POSITIONAL = "*"


@dataclass(eq=False)
class ModelInputs:
    """Of one model, by the paths and names of a spec.

    ``kinds``: how its attentions want what is cut over a mesh axis, if not evenly. The first call's
    inputs are cut evenly, and exchanged in the first block; from the second on as it wants them.

    Raises ShardingError for a path to no argument.
    """

    spec: ShardingSpec
    ranks: MosaicContext
    signature: inspect.Signature
    kinds: dict[str, Callable[[int, int], Layout]] = field(default_factory=dict)
    checks: dict[Any, DataCheck] = field(default_factory=dict, repr=False)
    length: int = 0  # of the last call, if there are buckets

    def __post_init__(self) -> None:
        known = self.signature.parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
            return
        for path in self.spec.inputs or {}:
            if path_parts(path)[0] not in known:
                raise ShardingError(
                    f"the model has no argument {path!r}",
                    arguments=", ".join(known),
                    fix="name dims of its arguments: inputs={'ids': 'batch tokens'}",
                )

    def note(self, axis: Axis) -> None:
        """How an attention of the model wants an axis cut."""
        n, p = axis.layout.n, axis.layout.p
        kinds: tuple[Callable[[int, int], Layout], ...] = (Layout.zigzag, Layout.zigzags)
        wanted = (kind for kind in kinds if kind(n, p) == axis.layout != Layout.even(n, p))
        if kind := next(wanted, None):
            self.kinds[axis.mesh_axis] = kind

    def is_step(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call is a step of decoding: without gradients, of one token."""
        given = named(self.signature.bind(*args, **kwargs))
        lengths: list[int] = []

        def note(x: Any, dims: list[str]) -> None:
            if isinstance(x, Tensor) and x.ndim == len(dims):
                axes = (str(axis) for axis in self.spec.sharded)
                lengths.extend(x.shape[dims.index(axis)] for axis in axes if axis in dims)

        for path, names in (self.spec.inputs or {}).items():
            replaced(given, path_parts(path), partial(note, dims=names.split()))
        return not torch.is_grad_enabled() and bool(lengths) and set(lengths) == {1}

    def cut(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments, those with names cut. Raises ShardingError where ranks differ in what
        is whole, and for other dims than have names."""
        given = named(self.signature.bind(*args, **kwargs))
        found: dict[str, Tensor] = {}
        for path in self.spec.inputs or {}:
            replaced(given, path_parts(path), partial(found.setdefault, path))
        if not found:
            raise ShardingError(
                "the call gives none of the inputs that have names",
                names=", ".join(self.spec.inputs or {"none": ""}),
                fix="name dims of arguments that it gives: inputs={'ids': 'batch tokens'}",
            )
        self.compare({k: x for k, x in found.items() if type(x) is Tensor})
        for path, names in (self.spec.inputs or {}).items():
            one = partial(self.cut_one, path=path, names=names.split())
            given = replaced(given, path_parts(path), one)
        return tuple(given.pop(POSITIONAL, ())), given

    def compare(self, whole: dict[str, Tensor]) -> None:
        """Raise ShardingError where ranks that share a sample are given different data."""
        shares = ",".join(axis for axis in self.ranks.axes if axis != "dp")
        group = self.ranks.group(shares)
        every = self.spec.check_inputs == "always"
        if group is None or dist.get_backend(group) == "fake" or not self.spec.check_inputs:
            return
        sizes = tuple((path, *x.shape) for path, x in whole.items())
        if sizes not in self.checks:
            arguments = [Input(i, f"L['{path}']", is_state=False) for i, path in enumerate(whole)]
            self.checks[sizes] = DataCheck(self.ranks, group, "inputs", arguments, (), every)
        self.checks[sizes](list(whole.values()))

    def settle(self) -> None:
        """Raise ShardingError where ranks differ, before the call's results are given."""
        for check in self.checks.values():
            check.settle()

    def cut_one(self, x: Any, path: str, names: list[str]) -> Any:
        """An input with its named axes cut; where it is cut already it is as it is."""
        if not isinstance(x, Tensor) or x.ndim != len(names):
            raise ShardingError(
                f"{path} has other dims than its names",
                names=" ".join(names),
                sizes=list(x.shape) if isinstance(x, Tensor) else type(x).__name__,
                fix="give each dim a name, and _ to those that do not matter",
            )
        held = x.layout_along if isinstance(x, ShardedTensor) else {}
        for axis, method in self.spec.sharded.items():
            dim = names.index(str(axis)) if str(axis) in names else None
            if dim is None or dim in held:
                continue
            kind, p = self.kinds.get(method.mesh, Layout.even), self.ranks.size(method.mesh)
            layout = layout_of(x.shape[dim], p, kind, self.spec.buckets)
            self.length = layout.n if self.spec.buckets is not None else 0
            x = distribute(x, dim, layout, method.mesh)
        return pattern(x)


def named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """A call's arguments by name; what only has a place under ``POSITIONAL``."""
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            given.setdefault(POSITIONAL, []).extend(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            given.setdefault(POSITIONAL, []).append(value)
        else:
            given[name] = value
    return given


def replaced(tree: Any, way: Sequence[str], change: Callable[[Any], Any]) -> Any:
    """A copy of nested arguments in which ``change`` was made at the end of the way, if that leads
    to a value."""
    if not way:
        return tree if tree is None else change(tree)
    key, *rest = way
    if isinstance(tree, Mapping):
        return {**tree, key: replaced(tree[key], rest, change)} if key in tree else tree
    if isinstance(tree, (list, tuple)):
        items = [replaced(x, rest, change) if str(i) == key else x for i, x in enumerate(tree)]
        return type(tree)(items)
    if not hasattr(tree, key):
        return tree
    other = copy(tree)
    setattr(other, key, replaced(getattr(tree, key), rest, change))
    return other
