"""What a program may hold that Mosaic cannot follow: refused by name, with the line and a way out.

Looked for in Dynamo's graph, before anything is traced: inside the tracer it would be an error of
torch's own, which says neither what it is nor what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor

from mosaic.api.errors import UnsupportedError
from mosaic.graph.inputs import Input
from mosaic.graph.source import user_of, where
from mosaic.runtime.deferred_tensor import DeferredTensor
from mosaic.runtime.sharded_tensor import ShardedTensor
from mosaic.torch_private import (
    INLINED,
    HigherOrderOperator,
    autograd_function_apply,
    flex_op,
    has_contexts,
    is_traceable_wrapper_subclass,
    placeholder_source,
    policy_of,
    tag_activation_checkpoint,
)

FOLLOWED = {*INLINED, tag_activation_checkpoint, autograd_function_apply, flex_op}
LOOP = "write the loop in Python, which is unrolled, or {outside}"
OUTSIDE = "do it outside of the compiled function (torch.compiler.disable: what passes is whole)"
#: How to do without, by the name of a higher-order op.
WAYS_OUT = {
    "cond": f"compute both and choose with torch.where, or {OUTSIDE}",
    "triton_kernel_wrapper_mutation": "wrap the kernel in torch.library.custom_op with "
    f"mutates_args=(), or {OUTSIDE}",
    **dict.fromkeys(
        ("map_impl", "scan", "associative_scan", "while_loop"), LOOP.format(outside=OUTSIDE)
    ),
}
HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "register_multi_grad_hook"}
#: Tensors that are not one plain block of numbers, by where their class comes from.
UNWRAPPED = {
    "NestedTensor": "pad to one length, and pass a mask or ids of documents",
}


def refuse_unknown(module: fx.GraphModule) -> None:
    """Raise UnsupportedError for higher-order ops that have no rule, for hooks, for ops of the
    user's that write to their inputs, and for tensors that are no plain ones (of DTensors
    ``dtensors.py`` says more)."""
    for number, node in enumerate(module.graph.find_nodes(op="placeholder")):
        name = Input(number, *placeholder_source(node)).name
        refuse_wrapped(node, name, user_of(node))
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                refuse_called(node)
                refuse_wrapped(node, node.name, node)


def refuse_called(node: fx.Node) -> None:
    target = node.target
    is_higher = isinstance(target, HigherOrderOperator)
    name = target.name() if is_higher else str(target)
    if name in HOOKS:
        raise UnsupportedError(
            f"a hook on the gradient of a tensor in the program ({name})",
            where=where(node),
            reason="it would be given the gradient of this rank's part",
            fix="write what it does as a torch.autograd.Function, whose backward is run whole, "
            "or put the hook on a parameter or an input, outside of the compiled function",
        )
    if node.op == "call_method" and name == "full_tensor":
        raise UnsupportedError(
            "x.full_tensor() inside of what is compiled, where every tensor is the whole one",
            where=where(node),
            fix="leave it out, or call it on what the compiled function gives",
        )
    if target is tag_activation_checkpoint:
        refuse_contexts(node)
    if is_higher and target not in FOLLOWED:
        raise UnsupportedError(
            f"{name} holds a program of its own, which Mosaic does not cut",
            where=where(node),
            fix=WAYS_OUT.get(name, OUTSIDE),
        )
    schema = schema_of(target)
    if schema is not None and schema.is_mutable and not schema.name.startswith("aten::"):
        raise UnsupportedError(
            f"{schema.name} writes to its input, and nothing is known of what it writes",
            where=where(node),
            fix="define it with mutates_args=() and return what it makes, "
            "or call it outside of the compiled function",
        )


def refuse_contexts(node: fx.Node) -> None:
    """Of a checkpoint's ``context_fn``, but for those of a policy, which is asked later."""
    region: Any = getattr(node.graph.owning_module, str(node.args[0]))
    if has_contexts(region) and policy_of(region) is None:
        raise UnsupportedError(
            "a checkpoint has a context_fn that is no policy, and a compiled program enters no "
            "contexts",
            where=where(node),
            fix="give it torch.utils.checkpoint.create_selective_checkpoint_contexts with a "
            "policy, or leave context_fn out",
        )


def schema_of(target: Any) -> Any:
    """Of an op, or of the first overload of its packet."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return getattr(target, "_schema", None)


def refuse_wrapped(node: fx.Node, name: str, shown: fx.Node) -> None:
    for value in as_values(node.meta.get("example_value")):
        kind = kind_of(value)
        if kind is not None:
            raise UnsupportedError(
                f"{name} is a {kind}, and Mosaic cuts plain tensors only",
                where=where(shown),
                fix=UNWRAPPED.get(kind, f"use plain tensors inside of it, or {OUTSIDE}"),
            )


def as_values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def kind_of(value: Any) -> str | None:
    """What a tensor is that is no plain one."""
    if not isinstance(value, torch.Tensor):
        return None
    kind = type(value).__name__
    if isinstance(value, (ShardedTensor, DeferredTensor, DTensor)):
        return None
    if bool(is_traceable_wrapper_subclass(value)):
        return kind
    if value.is_nested:
        return "NestedTensor"
    if value.layout != torch.strided:
        return f"{str(value.layout).removeprefix('torch.')} tensor"
    return "quantized tensor" if value.is_quantized else None
