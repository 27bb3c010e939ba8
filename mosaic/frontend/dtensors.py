"""DTensors in Dynamo's graph: which are followed, and what their calls say.

Tensor parallelism (``parallelize_module`` with column and row styles) makes parameters DTensors
over a mesh axis of its own, and turns activations into DTensors and back around each layer. A
tensor over an axis that ``mosaic.init`` knows is followed (``runtime/dtensors.py``); others are
refused, with the line and the way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from mosaic.api.errors import UnsupportedError
from mosaic.graph.inputs import Input
from mosaic.graph.source import nodes_of, user_of, where
from mosaic.layout import Layout, Place
from mosaic.runtime.deferred_tensor import flattened
from mosaic.runtime.dtensors import PARTIAL, REPLICATED
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import call_of_dtensor, placeholder_source, pytree

NAMED = (
    "say which mesh axis it is over: mosaic.init(mesh_shape=(2, 2), mesh_axes=('sp', 'tp')), and "
    "parallelize_module(model, ranks.mesh['tp'], plan)"
)
OVER_ONE = "let fully_shard gather it over all of them but one, before the forward"
NOT_CUT = (
    "distribute it over another axis, as 'tp' or 'dp'; mosaic.parallelize(..., fully_shard=True) "
    "shards parameters over this one"
)
moves = torch.ops.mosaic


def axis_of(module: fx.GraphModule, ranks: MosaicContext | None) -> str | None:
    """The mesh axis that the DTensors of Dynamo's graph are over, if it is one of ours."""
    values = (n.meta.get("example_value") for n in nodes_of(module))
    names = (x.device_mesh.mesh_dim_names or () for x in values if isinstance(x, DTensor))
    known = (name for few in names for name in few if ranks and name in ranks.axes)
    return next(known, None)


def refuse(
    module: fx.GraphModule, ranks: MosaicContext | None, axis: str | None, cut: set[str]
) -> None:
    """Raise UnsupportedError for a DTensor that is not followed. ``cut``: over which mesh axes
    Mosaic cuts activations."""
    for number, node in enumerate(nodes_of(module)):
        x = node.meta.get("example_value")
        why = why_not_followed(node, x, ranks, axis, cut) if isinstance(x, DTensor) else None
        if why is not None:
            is_input = node.op == "placeholder"
            name = Input(number, *placeholder_source(node)).name if is_input else node.name
            raise UnsupportedError(
                f"{name} is a DTensor, and {why[0]}",
                where=where(user_of(node) if is_input else node),
                fix=why[1],
            )
        move_of(node)  # refuses what has no exact form
    for node in module.graph.output_node().args[0]:
        if isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), DTensor):
            raise UnsupportedError(
                f"the program gives a DTensor ({node.name})",
                where=where(node),
                fix="give a plain tensor: x.to_local(), or use_local_output=True in the style of "
                "the layer that makes it; and let no graph break come between",
            )


def why_not_followed(
    node: fx.Node, x: DTensor, ranks: MosaicContext | None, axis: str | None, cut: set[str]
) -> tuple[str, str] | None:
    """What is wrong with a DTensor, and the way out."""
    if node.op == "placeholder" and isinstance(x._local_tensor, ShardedTensor):
        return (
            "it was made of a ShardedTensor, outside of what is compiled",
            "put the layer's style on modules inside of the block that is compiled",
        )
    return why_not_over(x, ranks, axis, cut) or why_no_placement(x) or why_not_made(node)


def why_not_over(
    x: DTensor, ranks: MosaicContext | None, axis: str | None, cut: set[str]
) -> tuple[str, str] | None:
    """What is wrong with a DTensor's mesh, and the way out."""
    mesh, names = x.device_mesh, x.device_mesh.mesh_dim_names or ()
    if mesh.ndim != 1:
        return f"it is over {mesh.ndim} mesh axes, where one is followed", OVER_ONE
    if ranks is None or axis is None or names[:1] != (axis,):
        return "its mesh is no axis of mosaic.init", NAMED
    mine, theirs = dist.get_process_group_ranks(ranks.group(axis)), mesh.mesh.tolist()
    if mine != theirs:
        return f"mesh axis '{axis}' of mosaic.init has other ranks: {mine}, not {theirs}", NAMED
    if axis in cut:
        return f"Mosaic cuts activations over its mesh axis '{axis}'", NOT_CUT
    return None


def why_no_placement(x: DTensor) -> tuple[str, str] | None:
    """What is wrong with how a DTensor is cut, and the way out."""
    (placement,) = x.placements
    is_sum = isinstance(placement, Partial) and placement.reduce_op == "sum"
    if type(placement) not in (Shard, Replicate) and not is_sum:
        return f"its placement {placement} is not followed", "use Shard, Replicate or Partial()"
    p = x.device_mesh.size()
    if isinstance(placement, Shard) and int(x.shape[placement.dim]) % p:
        sizes = [int(n) for n in x.shape]
        return (
            f"dim {placement.dim} of its sizes {sizes} has no {p} equal parts",
            "make the size (heads, features) a multiple of the ranks, or leave this layer whole",
        )
    return None


def why_not_made(node: fx.Node) -> tuple[str, str] | None:
    """What is wrong with a call that makes a DTensor of none."""
    given = (n.meta.get("example_value") for n in node.all_input_nodes)
    is_made = node.op != "placeholder" and not any(isinstance(x, DTensor) for x in given)
    call = call_of_dtensor(node)
    if not is_made or (call is not None and call[0] == "from_local"):
        return None
    name = getattr(node.target, "__name__", node.target)
    return f"{name} makes it", "make it by DTensor.from_local, or outside of what is compiled"


def dim_of(placement: Any, ndim: int) -> int:
    """Along which dim a placement cuts, as the moves take it."""
    if isinstance(placement, Shard):
        return placement.dim % ndim
    return PARTIAL if isinstance(placement, Partial) else REPLICATED


def place_of(x: DTensor) -> Place | None:
    """Where a followed DTensor is cut; None: all of it is on every rank."""
    dim = dim_of(x.placements[0], x.ndim)
    (axis,) = x.device_mesh.mesh_dim_names or ()
    p = x.device_mesh.size()
    return Place(Layout.even(x.shape[dim], p), dim, mesh_axis=axis) if dim >= 0 else None


def cut(module: fx.GraphModule) -> dict[int, Place]:
    """Where each input is cut that is a DTensor, by its number."""
    inputs = module.graph.find_nodes(op="placeholder")
    given = flattened([n.meta["example_value"] for n in inputs])
    found = {i: place_of(x) for i, x in enumerate(given) if isinstance(x, DTensor)}
    return {i: place for i, place in found.items() if place is not None}


def with_plain_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose layers make DTensors of what it is given."""

    @functools.wraps(forward)
    def call_on_plain(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            args, kwargs = pytree.tree_map_only(Tensor, moves.plain, (args, kwargs))
        return forward(*args, **kwargs)

    return call_on_plain


def move_of(node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """What a call of Dynamo's graph does between a rank's tensor and the whole one; None for any
    other call. Raises UnsupportedError for one that has no exact form here."""
    if node.target is moves.plain:
        return lambda x: x
    call = call_of_dtensor(node)
    if call is None:
        return None
    name, given = call
    x, out = node.args[0].meta["example_value"], node.meta["example_value"]
    like = out if isinstance(out, DTensor) else x
    dim = dim_of(like.placements[0], like.ndim)
    over = (*(like.device_mesh.mesh_dim_names or ()), like.device_mesh.size())
    refuse_options(node, name, given, dim)
    if name == "from_local":
        return partial(apply, moves.from_rank, (dim, *over))
    if name == "redistribute":
        return partial(apply, moves.redistribute, (dim, *over))
    return partial(apply, moves.to_rank, (dim, meeting(node, given, dim), *over))


def apply(op: Any, rest: tuple[Any, ...], x: Tensor) -> Tensor:
    found: Tensor = op(x, *rest)
    return found


def refuse_options(node: fx.Node, name: str, given: dict[str, Any], dim: int) -> None:
    odd = [key for key in ("forward_dtype", "backward_dtype", "shape", "stride") if given.get(key)]
    if name == "from_local" and given.get("grad_placements"):
        odd.append("grad_placements")
    if odd:
        raise UnsupportedError(
            f"DTensor.{name} with {', '.join(odd)} is not followed",
            where=where(node),
            fix="leave it out: cast with .to(dtype) before or after, and let sizes be even",
        )
    if dim == PARTIAL and name != "from_local":
        raise UnsupportedError(
            f"DTensor.{name} gives one rank's part of a sum",
            where=where(node),
            reason="sums of tensor parallelism meet at once in what Mosaic writes",
            fix="redistribute it first: x.redistribute(placements=[Replicate()]) "
            "(RowwiseParallel() does)",
        )


def meeting(node: fx.Node, given: dict[str, Any], dim: int) -> str:
    """How the ranks' gradients of a replicated tensor meet."""
    wanted = given.get("grad_placements")
    if not wanted or dim_of(wanted[0], 1) == dim or isinstance(wanted[0], Replicate):
        return ""
    if dim == REPLICATED and isinstance(wanted[0], Partial) and wanted[0].reduce_op in SUMS:
        return str(wanted[0].reduce_op)
    raise UnsupportedError(
        f"DTensor.to_local with grad_placements={wanted} is not followed",
        where=where(node),
        fix="of a replicated DTensor, say Replicate() or Partial(), or nothing",
    )


SUMS = ("sum", "avg")
