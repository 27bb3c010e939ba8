"""Calls of recurrences as transformers' models write them: taken whole, as one op.

    torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, ...)
    ->   out, last_state = mosaic.recurrence([query, key, value, g, beta], "...")

Dynamo would write out their loops over chunks or tokens, in which nobody finds the recurrence.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from mosaic.recurrences.call import Recurrence, is_of_package
from mosaic.recurrences.kinds import KINDS
from mosaic.recurrences.op import RECURRENCE

#: Where such functions are: in a model's own module, the library's or one that came with weights.
MODULES = re.compile(r"(transformers\.models|transformers_modules)\..*modeling_\w+$")


def call_of(target: Any) -> Callable[..., Any] | None:
    """What capture runs in place of a call in Dynamo's graph, if it is one of these."""
    return partial(recurrence, target) if is_known(target) else None


def is_known(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name in KINDS and MODULES.match(function.__module__ or "") is not None


def recurrence(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of one of them, as the op."""
    kind = KINDS[function.__name__]
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    others = given.pop("kwargs", {})
    if others.get("cu_seqlens") is not None or others.get("seq_idx") is not None:
        return function(*args, **kwargs)  # which refuses texts
    is_asked = given.pop(kind.asks, False)
    known, tensors = Recurrence.of(function, given, len(args))
    out, last = RECURRENCE(tensors, known.encode())
    if kind.is_pair:
        return out, last if is_asked else None
    return (out, last) if is_asked else out


def allow_functions() -> None:
    """Have Dynamo keep calls of them, in the models that are imported."""
    for module in [sys.modules[name] for name in list(sys.modules) if MODULES.match(name)]:
        for name in KINDS:
            function = getattr(module, name, None)
            if inspect.isfunction(function):
                allow(function)


@lru_cache(maxsize=1024)
def allow(function: Callable[..., Any]) -> None:
    """Dynamo runs what it keeps on tensors without memory, which a package's kernels cannot: there
    it finds the op in the function's place; of packed texts the package, as without us."""
    if not is_of_package(function):
        torch.compiler.allow_in_graph(function)
        return
    inner = inspect.getclosurevars(function).nonlocals
    package, names = inner["implementation"], inner["applicable_params"]

    @torch.compiler.allow_in_graph
    @functools.wraps(function)
    def as_op(*args: Any, **kwargs: Any) -> Any:
        return recurrence(function, *args, **kwargs)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None:
            return package(*args, **{name: x for name, x in kwargs.items() if name in names})
        return as_op(*args, **kwargs)

    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(stand_in)
