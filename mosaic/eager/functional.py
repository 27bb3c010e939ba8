"""Attention on shards, in eager code: ``mosaic.attention``, on which the modules stand.

Dynamo keeps each call as one node (``allow_in_graph``), and AOTAutograd traces what is in it, with
sizes that it knows: so the same Python runs in eager code and in torch.compile, where it leaves
nothing but the ops and strings, and another length is compiled anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mosaic.api.errors import ShardingError
from mosaic.api.methods import Local, Method, key_of, method_named
from mosaic.attention.blocks import FULL, Band
from mosaic.attention.op import calls_of, sharded_attention
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import machine_of, resolve
from mosaic.attention.visit import Inputs
from mosaic.eager.operands import (
    band_of,
    check_inputs,
    check_probability,
    check_scale,
    check_tensors,
    fitted,
    four_dims,
)
from mosaic.eager.tensors import layout_text
from mosaic.eager.whole import are_of_wholes, attention_of_wholes
from mosaic.layout import Layout
from mosaic.runtime.agreement import check_calls_alike, check_shards_alike
from mosaic.runtime.collectives import enter, enter_together
from mosaic.runtime.mesh import context_or_world_of_one
from mosaic.runtime.rng import draw_seed
from mosaic.runtime.world import World, world_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: str | Method = "auto",
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    key_layout: Layout | None = None,
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys; exact, and differentiable.

    q (batch, heads, seq, head_dim), k (batch, kv_heads, keys, head_dim) and v (batch, kv_heads,
    keys, v_dim) are this rank's shards, of one floating dtype; kv_heads divides heads. Gives
    (batch, heads, seq, v_dim). The gradient of a shard is this rank's part of the whole gradient,
    where the loss is the sum of the ranks' losses.

    method: a name or an object such as ``mosaic.Mesh2D(2, 2)``; its ``mesh`` is the mesh axis over
        which the sequence is cut. One that cannot do this attention exactly is replaced by one that
        can. On one rank everything is local.
    causal, window: query i sees keys up to i; keys i - left ... i + right, for (left, right), where
        None is unbounded. Positions are global, of the queries' axis and of the keys' axis.
    mask: (batch|1, heads|1, rows|1, all keys|1), boolean (True is seen) or added to the scores.
        Its rows are this rank's queries; its columns are all ranks' keys.
    query_documents, key_documents: ids (batch|1, all queries) and (batch|1, all keys), whole on
        every rank; equal ones attend. The keys' are the queries' if left out.
    scale: of the scores; None is 1 / sqrt(head_dim).
    dropout: probability with which a weight is dropped, by a seed that is drawn once a call: the
        same weights for every method and number of ranks. ("local" sends no seed: ranks draw alike
        if they are seeded alike, and take the batch for the whole batch.)
    layout: who holds which queries. None is that of ``mosaic.shard_tensor``, else equal shards, one
        behind the other, which the ranks compare when a shape is new.
    key_layout: the same of the keys; None is ``layout``. A ``Layout.whole`` says that every rank
        has all of them, and then their gradient is whole, too.

    Where a tensor is a ShardedTensor, or the compiled function that calls this was given one, all
    of them stand for the whole program's: a mask has all rows, there are no layouts, and the loss
    is that of one device.

    Raises ShardingError where tensors, sizes, layouts, the mesh axis and the method do not fit.
    """
    name = key_of(method)
    if not (window is None or (isinstance(window, (tuple, list)) and len(window) == 2)):
        raise ShardingError(
            f"window = {window!r} is no pair of bounds",
            fix="give keys to the left and to the right: window=(128, 0), None where unbounded",
        )
    left, right = (None, None) if window is None else window
    mesh = mesh_of(name)
    queries = layout_text(layout, q, 2, mesh)
    keys = layout_text(key_layout, k, 2, mesh) or queries
    tensors = (q, k, v, mask, query_documents, key_documents)
    return attention_node(*tensors, name, causal, left, right, scale, dropout, queries, keys)


@dataclass(frozen=True)
class Request:
    """What is asked for beside the tensors."""

    method: Method
    band: Band = FULL
    scale: float | None = None
    dropout: float = 0.0
    layout: Layout | None = None
    key_layout: Layout | None = None


@torch.compiler.assume_constant_result
def mesh_of(key: str) -> str:
    return method_named(key).mesh


# --- nodes: what Dynamo does not look into -----------------------------------------------------


@torch.compiler.allow_in_graph
def attention_node(
    q, k, v, mask, query_documents, key_documents, method,
    causal, left, right, scale, dropout, layout, key_layout,
):  # fmt: skip
    """``attention``, with a method and layouts as strings."""
    check_probability(dropout)
    check_scale(scale)
    inputs = Inputs(mask, query_documents, key_documents)
    if are_of_wholes(q, k, v, *inputs[:3]):
        bounds, layouts = (causal, left, right), layout or key_layout
        return attention_of_wholes(q, k, v, inputs, method, bounds, scale, dropout, layouts)
    request = Request(
        method_named(method),
        band_of(causal, left, right),
        None if scale is None else float(scale),
        float(dropout),
        parsed(layout),
        parsed(key_layout),
    )
    return carry_out(q, k, v, inputs, request)


@torch.compiler.allow_in_graph
def parameters_node(
    parameters: list[Tensor], inputs: list[Tensor], method: str, layout: str
) -> list[Tensor]:
    """Parameters of a module with these inputs: gradients of those for shards of this layout are
    summed over the ranks."""
    if are_of_wholes(*inputs):
        return list(parameters)
    found, world = parsed(layout), ranks_of(method_named(method))
    if world.size == 1 or not (found is None or found.is_cut):
        return list(parameters)
    return enter_together(parameters, world.group)


def parsed(text: str) -> Layout | None:
    return Layout.parse(text) if text else None


# --- one attention ---------------------------------------------------------------------------


def ranks_of(method: Method) -> World:
    """The ranks among which a method's axis is cut; for ``Local`` this one alone."""
    context = context_or_world_of_one()
    return world_of(None if isinstance(method, Local) else context, method.mesh)


def carry_out(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, request: Request) -> Tensor:
    """Check everything, decide how it is done, and do it."""
    world = ranks_of(request.method)
    check_tensors(q, k, v)
    context = context_or_world_of_one()
    if world.size > 1 and context is not None:
        asked = _text_of(request.method, request.band, request.scale, request.dropout)
        check_calls_alike(context, world.mesh_axis, asked)  # layouts and sizes are compared below
    query, key = layouts(q, k, request, world)
    inputs = four_dims(inputs)
    check_inputs(q, inputs, query, key)
    plan = plan_of(q, k, v, inputs, request, world, query, key)
    mask = inputs.mask
    if query.is_cut and not key.is_cut:
        k, v = enter(k, world.group), enter(v, world.group)
    if mask is not None and mask.is_floating_point() and serves_all(mask, query, key):
        mask = enter(mask, world.group)
    seed = draw_seed(world.group, str(q.device)) if plan.dropout else None
    return sharded_attention(
        q,
        k,
        v,
        inputs._replace(mask=mask, seed=seed),
        _calls(plan, int(q.shape[1]), int(k.shape[1])),
    )


def text_of(method: Method, band: Band, scale: float | None, dropout: float) -> str:
    return f"method = {method}, band = {str(band) or 'full'}, scale = {scale}, dropout = {dropout}"


# Eager code asks at every call, and "auto" compares all methods to answer.
_text_of = lru_cache(maxsize=1024)(text_of)
_resolve = lru_cache(maxsize=1024)(resolve)
_calls = lru_cache(maxsize=1024)(calls_of)


def serves_all(mask: Tensor, query: Layout, key: Layout) -> bool:
    """Whether a mask is a whole tensor of which each rank computes a share of the gradient."""
    return mask.shape[2] == 1 if query.is_cut else key.is_cut


def layouts(q: Tensor, k: Tensor, request: Request, world: World) -> tuple[Layout, Layout]:
    """Those of the queries and of the keys, which fit the tensors on every rank."""
    given = (request.layout, request.key_layout)
    unknown = [x for x, layout in zip((q, k), given, strict=True) if layout is None]
    context = context_or_world_of_one()
    if unknown and world.size > 1 and context is not None:
        shapes = tuple(tuple(map(int, x.shape)) for x in unknown)
        check_shards_alike(context, world.mesh_axis, shapes, 2)
    query = fitted("q", q, given[0], world, "layout")
    return query, fitted("k", k, given[1], world, "key_layout")


def plan_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    request: Request,
    world: World,
    query: Layout,
    key: Layout,
) -> AttentionPlan:
    if world.size > 1 and 0 in (*q.shape[:2], query.n, key.n, q.shape[3], v.shape[3]):
        raise ShardingError(
            "an attention of empty tensors is cut",
            sizes=f"{query.n} queries, {key.n} keys; q {list(q.shape)}, v {list(v.shape)}",
            fix="leave the call out where there is nothing to attend to",
        )
    scale = int(q.shape[3]) ** -0.5 if request.scale is None else request.scale
    problem = AttentionProblem(
        query=query,
        key=key,
        batch=int(q.shape[0]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        dim=int(q.shape[3]),
        v_dim=int(v.shape[3]),
        itemsize=q.element_size(),
        band=request.band,
        has_rows=may_have_rows(inputs.mask, query),
    )
    strategy, _ = _resolve(request.method, problem, machine_of(world))
    return AttentionPlan(
        strategy, world.rank, world.group, query, key, request.band, scale, request.dropout
    )


def may_have_rows(mask: Tensor | None, query: Layout) -> bool:
    """Whether a mask may have a row for each query, decided alike on all ranks: on one that holds a
    single query nobody can tell."""
    return mask is not None and (mask.shape[2] != 1 or 1 in query.lengths)
