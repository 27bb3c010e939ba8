"""What passes and rules ask about an op, or a value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

#: Pointwise ops that torch does not tag so.
POINTWISE = frozenset(
    "__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor "
    "_conj _to_copy alias clone complex detach detach_copy empty_like fill.Scalar fill.Tensor "
    "full_like masked_fill.Scalar masked_fill.Tensor ones_like polar type_as "
    "where.self where.ScalarOther where.ScalarSelf where.Scalar zero zeros_like".split()
)


def key(target: Any) -> str:
    """``aten.mean.dim`` -> ``mean.dim``, ``aten.view.default`` -> ``view``.

    Ops of other libraries keep their namespace: ``mine::linear`` need not be a linear.
    """
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    return f"{name}.{schema.overload_name}" if schema.overload_name else name


def is_pointwise(target: Any) -> bool:
    return key(target) in POINTWISE or torch.Tag.pointwise in target.tags


#: What patterns are made with, beside pointwise ops and views.
ALSO = frozenset(
    "index.Tensor cat cumsum diff lift_fresh new_ones new_zeros new_full tril triu".split()
)


def makes_patterns(target: Any) -> bool:
    """Whether an op may stand in a program of positions and ids that makes a mask."""
    is_view = any(r.alias_info is not None for r in target._schema.returns)
    return is_pointwise(target) or is_view or key(target) in ALSO


def is_effect(node: fx.Node) -> bool:
    """Whether a call has no result and is there for what it does: a check."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and not schema.returns


def differentiable(x: torch.Tensor) -> bool:
    """Whether x may have a gradient: complex numbers may, too."""
    return x.is_floating_point() or x.is_complex()
