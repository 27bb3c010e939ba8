"""``@mosaic.shard(...)``: compile a class, an instance or a function without editing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from mosaic.api.errors import ShardingError
from mosaic.api.methods import Method
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.backend import mosaic as backend

T = TypeVar("T")


def shard(
    inputs: Mapping[str, str] | None = None,
    axes: Mapping[str | int, Method | str] | None = None,
    *,
    inner: str = "inductor",
    **contract: Any,
) -> Callable[[T], T]:
    """Compile what it decorates with the backend ``mosaic``; the arguments are ShardingSpec's.

    A class: every instance's ``forward`` is compiled. An instance: this one's. A function: it.

    >>> @shard(inputs={"x": "batch rows columns"}, axes={"rows": "ring"})
    ... class Model(torch.nn.Module): ...

    Raises ShardingError at once for a spec that does not fit together.
    """
    if is_target(inputs):
        raise ShardingError(
            f"mosaic.shard was given {getattr(inputs, '__name__', type(inputs).__name__)} itself",
            fix="write @mosaic.shard() with parentheses, or mosaic.shard()(model)",
        )
    spec = ShardingSpec(inputs=inputs, axes=axes, **contract)

    def decorate(target: T) -> T:
        if not is_target(target):
            raise ShardingError(
                f"cannot shard {target!r}",
                fix="decorate an nn.Module class, an instance or a function",
            )
        if isinstance(target, torch.nn.Module) or is_module_class(target):
            model: Any = target
            model.forward = compiled(model.forward)
            return target
        return compiled(target)

    def compiled(fn: Any) -> Any:
        options: dict[str, Any] = {"spec": spec, "inner": inner}
        return torch.compile(fn, backend=backend, options=options)

    return decorate


def is_target(target: object) -> bool:
    """Whether it can be decorated: an nn.Module class, an instance or a function."""
    return is_module_class(target) or (callable(target) and not isinstance(target, type))


def is_module_class(target: object) -> bool:
    return isinstance(target, type) and issubclass(target, torch.nn.Module)
