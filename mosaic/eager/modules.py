"""Attention modules for models that are written for shards.

Each takes and gives this rank's part; outputs, and the gradients of inputs and of the module's own
parameters, are those of one device that has everything, where the loss is the sum of the ranks'
losses. Parameters are whole on every rank, and so is their gradient: it is summed over the ranks in
backward (reducers that take the mean over ranks, such as DDP, leave it as it is). Of other layers
in the model that work on shards (``nn.Linear``, ``nn.LayerNorm``) every rank has a share of the
gradient: ``sum_gradients(model)`` sums those.

A ShardedTensor knows what it is a part of: a module takes it as the whole tensor that it stands for
(masks have all rows, layouts are left out), however it is cut, and gives one.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from mosaic.api.errors import ShardingError
from mosaic.api.methods import (
    Composed,
    Folded,
    Hierarchical,
    Mesh2D,
    Method,
    Ulysses,
    key_of,
    method_named,
    method_of,
)
from mosaic.attention.blocks import CAUSAL, FULL
from mosaic.attention.visit import Inputs
from mosaic.eager.functional import (
    Request,
    attention,
    carry_out,
    parsed,
    ranks_of,
)
from mosaic.eager.operands import check_probability
from mosaic.eager.projections import (
    Projected,
    axis_of,
    chosen,
    folded,
    folded_mask,
    grid_shape,
)
from mosaic.eager.tensors import gather, layout_text, shard_tensor
from mosaic.eager.whole import are_of_wholes, attention_of_wholes
from mosaic.layout import Layout
from mosaic.runtime.agreement import check_shards_alike
from mosaic.runtime.mesh import get_context
from mosaic.runtime.sharded_tensor import checked_layout


class MultiAxisAttention(Projected):
    """Self-attention over one axis of a tensor of any rank; the other axes are a batch.

    ``forward(x)``: x (..., axis, ..., embed) with this rank's part of the axis; gives the same
    shape. ``mask``: (..., heads|1, rows|1, all keys|1), as in ``mosaic.attention``, where "..." are
    x's other axes in order, 1 or whole (or left out). ``layout``: who holds which part of the axis;
    None is what ``mosaic.shard_tensor`` did, else equal shards, one behind the other.

    attention_axis: which axis; negative ones count from the end, where embed is -1.
    backend: how ("local": every rank has the whole axis). A method object, such as
        ``mosaic.Ring(mesh="rows")``, names its mesh axis; a name means "sp".
    mesh_shape: (rows, cols) of the grid of ranks, for "mesh2d".
    num_kv_heads: fewer heads for keys and values; it divides num_heads.
    dropout: of attention weights, in training: the same for every backend and number of ranks.

    Raises ShardingError where sizes, layout, backend or ranks do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention_axis: int,
        backend: str | Method = "local",
        mesh_shape: tuple[int, int] | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        layout: Layout | None = None,
    ):
        method = chosen(backend, mesh_shape)
        super().__init__(embed_dim, num_heads, method, causal, num_kv_heads, bias, dropout)
        self.attention_axis, self.layout = attention_axis, layout

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, layout: Layout | None = None
    ) -> Tensor:
        axis = axis_of(x, self.attention_axis, self.embed_dim)
        rows = x.movedim(axis, -2)
        held = layout_text(layout or self.layout, x, axis, self.method.mesh)
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        *projections, last = self.parameters_of(layers, [x], held)
        q, k, v = (self.heads_of(folded(rows), layer) for layer in projections)
        out = self.attended(q, k, v, folded_mask(mask, rows), held, held)
        return self.joined(out, last).reshape(rows.shape).movedim(-2, axis)


class CrossAxisAttention(Projected):
    """Queries along one axis of a tensor attend to keys along an axis of another.

    ``forward(q_source, kv_source)``: q_source (..., q_axis, ..., embed) and kv_source
    (..., kv_axis, ..., embed), with this rank's parts of both axes; their other axes are a batch,
    the same for both in order and size. Gives q_source's shape. ``mask`` as in
    ``MultiAxisAttention``, with rows of q_axis and columns of kv_axis. ``layout`` is q_axis's and
    ``key_layout`` kv_axis's; None means equal shards, one behind the other, and
    ``mosaic.Layout.whole(n, p)`` an axis that every rank has all of.

    The other arguments are those of ``MultiAxisAttention``. Causal: query i sees keys up to i.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        q_axis: int,
        kv_axis: int,
        backend: str | Method = "local",
        mesh_shape: tuple[int, int] | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        layout: Layout | None = None,
        key_layout: Layout | None = None,
    ):
        method = chosen(backend, mesh_shape)
        super().__init__(embed_dim, num_heads, method, causal, num_kv_heads, bias, dropout)
        self.q_axis, self.kv_axis = q_axis, kv_axis
        self.layout, self.key_layout = layout, key_layout

    def forward(
        self,
        q_source: Tensor,
        kv_source: Tensor,
        mask: Tensor | None = None,
        *,
        layout: Layout | None = None,
        key_layout: Layout | None = None,
    ) -> Tensor:
        axis = axis_of(q_source, self.q_axis, self.embed_dim)
        kv_axis = axis_of(kv_source, self.kv_axis, self.embed_dim)
        rows, keys = q_source.movedim(axis, -2), kv_source.movedim(kv_axis, -2)
        if rows.shape[:-2] != keys.shape[:-2]:
            raise ShardingError(
                "the two tensors differ in another axis than those that attend",
                sizes=f"{list(q_source.shape)} without axis {axis}, "
                f"{list(kv_source.shape)} without axis {kv_axis}",
                fix="expand the axes that one of them lacks",
            )
        held = layout_text(layout or self.layout, q_source, axis, self.method.mesh)
        keys_held = key_layout or self.key_layout
        held_keys = layout_text(keys_held, kv_source, kv_axis, self.method.mesh)
        sources = [q_source, kv_source]
        query, last = self.parameters_of((self.q_proj, self.out_proj), sources, held)
        key, value = self.parameters_of((self.k_proj, self.v_proj), sources, held_keys)
        q = self.heads_of(folded(rows), query)
        k, v = (self.heads_of(folded(keys), layer) for layer in (key, value))
        out = self.attended(q, k, v, folded_mask(mask, rows), held, held_keys)
        return self.joined(out, last).reshape(rows.shape).movedim(-2, axis)


class MultiAxisAttention2D(Projected):
    """Self-attention over two axes at once: every pair (i of axis1, j of axis2) is a token.

    The ranks are a grid of mesh_shape = (rows, cols), rank = row * cols + col. axis1 is cut by the
    rows of the grid and axis2 by its cols: the ranks of one row hold the same part of axis1, those
    of one column the same part of axis2. ``forward(x)``: x (..., axis1, ..., axis2, ..., embed)
    with this rank's parts of both; gives the same shape. Tokens are numbered axis1 first (i * size
    of axis2 + j), which is the order of ``causal``. The method is Mesh2D(rows, cols).

    ``layout``: who holds which tokens, for parts that are not equal:
    ``mosaic.Layout.grid(layout of axis1 over the rows, layout of axis2 over the cols)``. With it
    ``shard_tensor(x.flatten(1, 2), 1, layout=...)`` cuts a whole (batch, axis1, axis2, embed).

    mesh: the mesh axis of the rows x cols ranks. Others as in ``MultiAxisAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        axis1: int,
        axis2: int,
        mesh_shape: tuple[int, int],
        causal: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        layout: Layout | None = None,
        mesh: str = "sp",
    ):
        method = Mesh2D(*grid_shape(mesh_shape), mesh=mesh)
        super().__init__(embed_dim, num_heads, method, causal, num_kv_heads, bias, dropout)
        self.axis1, self.axis2, self.layout = axis1, axis2, layout

    def forward(self, x: Tensor, *, layout: Layout | None = None) -> Tensor:
        axes = [axis_of(x, axis, self.embed_dim) for axis in (self.axis1, self.axis2)]
        if axes[0] == axes[1]:
            raise ShardingError(
                "axis1 and axis2 are one axis",
                sizes=f"axis {axes[0]} of {list(x.shape)}",
                fix="name two different dims of the input",
            )
        grid = x.movedim(axes, (-3, -2))
        tokens = grid.reshape(prod(grid.shape[:-3]), *grid.shape[-3:])
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        *projections, last = self.parameters_of(layers, [x], "")
        q, k, v = (self.heads_of(tokens, layer) for layer in projections)
        given = layout or self.layout
        held = "" if given is None else str(checked_layout(given))
        out = grid_node(q, k, v, self.key, self.causal, self.rate, held)
        return self.joined(out, last).reshape(grid.shape).movedim((-3, -2), axes)


@torch.compiler.allow_in_graph
def grid_node(q, k, v, method: str, causal: bool, dropout: float, layout: str) -> Tensor:
    """Attention over dims 2 and 3 of (batch, heads, n1, n2, head_dim) as one axis."""
    found = method_named(method)
    assert isinstance(found, Mesh2D)
    if are_of_wholes(q, k, v):
        sizes, bounds = q.shape[2:4], (causal, None, None)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        out = attention_of_wholes(q, k, v, Inputs(), method, bounds, None, dropout, layout)
        return out.unflatten(2, sizes)
    world, joint = ranks_of(found), parsed(layout)
    n1, n2 = int(q.shape[2]), int(q.shape[3])
    if joint is None and world.size > 1:
        check_shards_alike(get_context(), found.mesh, ((n1, n2),), 0)
        joint = _equal_grid(n1, n2, found.rows, found.cols, world.size)
    if joint is not None and not causal and not dropout:
        joint = _renumbered(joint)
    check_probability(dropout)
    request = Request(found, CAUSAL if causal else FULL, None, float(dropout), joint, joint)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    out = carry_out(q, k, v, Inputs(), request)
    return out.unflatten(2, (n1, n2))


def _equal_grid(n1: int, n2: int, rows: int, cols: int, p: int) -> Layout | None:
    """None where the grid does not fill the ranks: the method says so."""
    if rows * cols != p:
        return None
    return Layout.grid(Layout.even(n1 * rows, rows), Layout.even(n2 * cols, cols))


def _renumbered(layout: Layout) -> Layout:
    """Tokens in the order of ranks: where nothing depends on their numbers, one interval each."""
    starts = [sum(layout.lengths[:rank]) for rank in range(layout.p)]
    return Layout.of(layout.n, ([(a, a + n)] for a, n in zip(starts, layout.lengths, strict=True)))


# --- without projections -----------------------------------------------------------------------


class _Unprojected(nn.Module):
    """Attention of shards (batch, heads, seq, head_dim): the sequence is cut over all ranks."""

    def __init__(
        self, method: Method, causal: bool, dropout: float, scale: float | None,
        layout: Layout | None,
    ):  # fmt: skip
        super().__init__()
        self.method, self.causal, self.dropout = method, causal, dropout
        self.key = key_of(method)
        self.scale, self.layout = scale, layout

    def extra_repr(self) -> str:
        return f"{self.method}, causal={self.causal}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        layout: Layout | None = None,
        key_layout: Layout | None = None,
    ) -> Tensor:
        return attention(
            q,
            k,
            v,
            self.key,
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            layout=layout or self.layout,
            key_layout=key_layout,
        )


class ComposedAttention(_Unprojected):
    """Heads and sequence in parallel, over a mesh of mesh_shape = (heads, sequence) ranks.

    Rank = number along heads * sequence ranks + number along sequence. Each rank holds all heads of
    1 / (heads * sequence) of the sequence. The ranks of one column exchange sequence for heads,
    those of one row then share a longer sequence by ``seq_parallel``, and the output comes back.

    ``forward(q, k, v)``: shards (batch, heads, seq, head_dim); gives q's shape. ``mask``,
    ``layout`` and ``key_layout`` as in ``mosaic.attention``. ``shard_qkv`` cuts whole tensors, and
    ``gather_output`` makes an output whole.

    head_parallel: False leaves the heads together: all ranks share the sequence.
    seq_parallel: "ring", "all_gather", or an object such as ``mosaic.Mesh2D(2, 2)``.
    mesh: the mesh axis of all heads x sequence ranks.
    """

    def __init__(
        self,
        mesh_shape: tuple[int, int],
        head_parallel: bool = True,
        seq_parallel: str | Method = "ring",
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        layout: Layout | None = None,
        mesh: str = "sp",
    ):
        method: Method = method_of(seq_parallel, mesh=mesh)
        if head_parallel:
            composed = Composed(heads=Ulysses(mesh="head_parallel"), sequence=method)  # type: ignore[arg-type]
            method = Folded(composed, grid_shape(mesh_shape), mesh=mesh)
        super().__init__(method, causal, dropout, scale, layout)

    def shard_qkv(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's parts of whole (batch, heads, seq, head_dim)."""
        cut = partial(shard_tensor, dim=2, layout=layout or self.layout, mesh_axis=self.method.mesh)
        return cut(q), cut(k), cut(v)

    def gather_output(self, out: Tensor, layout: Layout | None = None) -> Tensor:
        """The whole output on every rank."""
        return gather(out, 2, layout=layout or self.layout, mesh_axis=self.method.mesh)


class HierarchicalAttention(_Unprojected):
    """Two levels: nodes of ``intra_node_size`` neighbouring ranks, and between nodes another way.

    ``forward(q, k, v)``: shards (batch, heads, seq, head_dim) of a sequence that is cut over all
    ranks; gives q's shape. ``mask``, ``layout`` and ``key_layout`` as in ``mosaic.attention``.

    inter_node_strategy: "ring" or "mesh2d".
    intra_node_strategy: "local" (keys and values are gathered in the node), "ring", "ulysses" or
        "mesh2d".
    mesh: the mesh axis of all ranks.
    """

    def __init__(
        self,
        intra_node_size: int,
        inter_node_strategy: str = "ring",
        intra_node_strategy: str = "local",
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        layout: Layout | None = None,
        mesh: str = "sp",
    ):
        strategies: tuple = (intra_node_strategy, inter_node_strategy)
        method = Hierarchical(intra_node_size, *strategies, mesh=mesh)
        super().__init__(method, causal, dropout, scale, layout)
