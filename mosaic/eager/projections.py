"""What the modules that project have in common: parameters, axes, and arguments that fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from mosaic.api.errors import ShardingError
from mosaic.api.methods import Local, Mesh2D, Method, key_of, method_of
from mosaic.eager.functional import attention_node, parameters_node
from mosaic.eager.operands import check_is_tensor, check_probability
from mosaic.runtime.comm import all_reduce
from mosaic.runtime.mesh import get_context


class Projected(nn.Module):
    """q, k, v and output projections (``nn.Linear``) around one attention."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        method: Method,
        causal: bool,
        num_kv_heads: int | None,
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("embed_dim", embed_dim, "num_heads", num_heads)
        check_divides("num_heads", num_heads, "num_kv_heads", kv_heads)
        check_probability(dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.method, self.causal, self.dropout = method, causal, dropout
        self.key = key_of(method)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, {self.method}, causal={self.causal}"
        )

    def sums_over(self, mesh_axis: str) -> bool:
        """Whether the parameters' gradients are summed over this mesh axis here."""
        return self.method.mesh == mesh_axis and not isinstance(self.method, Local)

    @property
    def rate(self) -> float:
        return self.dropout if self.training else 0.0

    def heads_of(self, x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
        """(batch, ..., embed) -> (batch, heads, ..., head_dim)."""
        return F.linear(x, *layer).unflatten(-1, (-1, self.head_dim)).movedim(-2, 1)

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: str, key_layout: str
    ) -> Tensor:
        """``mosaic.attention`` as this module does it."""
        tensors = (q, k, v, mask, None, None)
        options = (self.causal, None, None, None, self.rate)
        return attention_node(*tensors, self.key, *options, layout, key_layout)

    def joined(self, out: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
        """(batch, heads, ..., head_dim) -> (batch, ..., embed)."""
        return F.linear(out.movedim(1, -2).flatten(-2), *layer)

    def parameters_of(
        self, layers: Sequence[nn.Linear], inputs: list[Tensor], layout: str
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The layers' weights and biases, where the module has these inputs, and a layer rows of
        this layout: their gradients are summed."""
        given = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        left = iter(parameters_node(given, inputs, self.key, layout))
        return [(next(left), None if layer.bias is None else next(left)) for layer in layers]


# --- gradients of the other layers --------------------------------------------------------------


def sum_gradients(module: nn.Module, mesh_axis: str = "sp") -> None:
    """From now on every parameter's gradient is the sum over the ranks of the mesh axis.

    For layers that work on shards: each rank's gradient is a share, of its rows. Those parameters
    of Mosaic's modules that are summed already are left out. Call it once, when the module is as it
    will be trained: a copy of a parameter has no hook.
    """
    if not isinstance(module, nn.Module):
        raise ShardingError(f"{module!r} is no nn.Module", fix="pass the model, built already")
    group = get_context().group_name(mesh_axis)
    known = {
        id(parameter)
        for found in module.modules()
        if isinstance(found, Projected) and found.sums_over(mesh_axis)
        for parameter in found.parameters()
    }
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in known:
            parameter.register_hook(partial(all_reduce, group=group))


# --- arguments ----------------------------------------------------------------------------------


def chosen(backend: str | Method, mesh_shape: tuple[int, int] | None) -> Method:
    if backend == "mesh2d":
        if mesh_shape is None:
            raise ShardingError(
                "backend 'mesh2d' needs the shape of the grid",
                fix="pass mesh_shape=(rows, cols), with rows x cols the ranks of the mesh axis",
            )
        return Mesh2D(*grid_shape(mesh_shape))
    if mesh_shape is not None:
        raise ShardingError(
            f"mesh_shape = {mesh_shape} with backend {backend!r}",
            fix="leave it out: only 'mesh2d' has a grid of ranks",
        )
    return method_of(backend)


def grid_shape(mesh_shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(mesh_shape, (tuple, list)) or len(mesh_shape) != 2:
        raise ShardingError(f"mesh_shape = {mesh_shape!r} is no grid", fix="give two sizes")
    return mesh_shape[0], mesh_shape[1]


def check_divides(name: str, n: int, by: str, d: int) -> None:
    for what, given in ((name, n), (by, d)):
        if not isinstance(given, int):
            raise ShardingError(f"{what} = {given!r} is no whole number", fix="use 1 or more")
    if n < 1:
        raise ShardingError(f"{name} = {n} is not enough", fix="use 1 or more")
    if n >= 2**31:
        raise ShardingError(f"{name} = {n} is too much", fix=f"use less than {2**31}")
    if d < 1 or n % d:
        divisors = ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
        raise ShardingError(
            f"{by} does not divide {name}",
            sizes=f"{name} = {n}, {by} = {d}",
            fix=f"use one of {divisors} for {by}, or another {name}",
        )


def axis_of(x: Tensor, axis: int, embed_dim: int) -> int:
    """An axis of x from the front. Raises ShardingError for embed, and for one that x lacks."""
    check_is_tensor("the input", x)
    if not isinstance(axis, int):
        raise ShardingError(
            f"axis {axis!r} is no number of a dim",
            sizes=list(x.shape),
            fix="use a whole number, such as 1 or -2",
        )
    if (
        x.ndim < 2
        or x.shape[-1] != embed_dim
        or not -x.ndim <= axis < x.ndim
        or axis % x.ndim == x.ndim - 1
    ):
        raise ShardingError(
            f"the tensor is not (..., axis, ..., embed) with attention over axis {axis}",
            sizes=f"{list(x.shape)}, embed = {embed_dim}",
            fix="the last axis is embed, and attention is over another one",
        )
    return axis % x.ndim


def folded(rows: Tensor) -> Tensor:
    """(..., seq, embed) -> (batch, seq, embed)."""
    return rows.reshape(prod(rows.shape[:-2]), *rows.shape[-2:])


def folded_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """A mask (..., heads, rows, keys) over the other axes of ``rows`` (..., seq, embed)."""
    if mask is not None:
        check_is_tensor("mask", mask)
    if mask is None or prod(mask.shape[:-3]) == 1:
        return None if mask is None else mask.reshape(1, *mask.shape[-3:])
    full = mask.expand(*rows.shape[:-2], *mask.shape[-3:])
    return full.reshape(prod(rows.shape[:-2]), *mask.shape[-3:])
