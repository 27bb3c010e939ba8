"""A mask that other graphs of the same function read goes to them as what it is made of, and so
does a model's output that may never be read: logits whose loss is made without them.

    same = eq(unsqueeze(ids, 2), unsqueeze(ids, 1))                  # (batch, n, n)
    return (h, same)      ->      return (h, ids), and a recipe: unsqueeze, unsqueeze, eq

Where the graph breaks every rank would have to hold its rows of n x n, and the attentions behind
the break could not read what the mask means. Legal because a recipe has no gradient, looks at one
element of each operand (or at none), and takes the values that its operands have here: what leaves
the graph in place of the mask is a ``DeferredTensor``.

    return (loss, linear(hidden, head))  ->  return (loss, hidden), and a recipe: linear

Logits have a gradient: that of their recipe, to the hidden states and to the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mosaic.graph.emit import drop_dead
from mosaic.graph.ops import differentiable, makes_patterns
from mosaic.losses.heads import Logits, logits_of, records
from mosaic.partition.context import Context, Output
from mosaic.passes.normalize import is_random
from mosaic.runtime.deferred_tensor import Leaf, Recipe, Ref, Step, step_of
from mosaic.torch_private import is_alias

aten = torch.ops.aten


def defer_outputs(graph: fx.Graph, context: Context) -> int:
    written = len(context.mutated)
    nodes = graph.output_node().args[0]
    steps = steps_of(graph) if context.goes_on and context.world.size > 1 else set()
    new, said = list(nodes[:written]), list(context.outputs[:written])
    for node, about in zip(nodes[written:], context.outputs[written:], strict=True):
        found = mask_recipe(node, graph, about, steps)
        found = found or logits_recipe(node, graph, context)
        recipe, leaves = found or (None, [node])
        context.recipes.append(recipe)
        new += leaves
        said += [Output(x.meta["needs_gradient"]) for x in leaves] if recipe else [about]
    if not any(context.recipes):
        context.recipes.clear()
        return 0
    graph.output_node().args = (tuple(new),)
    context.outputs = tuple(said)
    drop_dead(graph)
    return sum(recipe is not None for recipe in context.recipes)


def steps_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that a recipe can have for steps: patterns of integers, and of floats what is made
    of a boolean pattern."""
    steps: set[fx.Node] = set()
    for node in graph.nodes:
        val, operands = node.meta.get("val"), node.all_input_nodes
        if not isinstance(val, Tensor) or not hasattr(node.target, "_schema"):
            continue
        if is_random(node) or not (makes_patterns(node.target) or not operands):
            continue
        of_patterns = [n.meta["val"].dtype for n in operands if n in steps]
        is_mask = any(dtype == torch.bool or dtype.is_floating_point for dtype in of_patterns)
        if not differentiable(val) or is_mask or not operands:
            steps.add(node)
    return steps


def mask_recipe(
    node: Any, graph: fx.Graph, about: Output, steps: set[fx.Node]
) -> tuple[Recipe, list[fx.Node]] | None:
    """How a mask for the graphs behind a break is made, and of which nodes; None where these are
    not much smaller."""
    if about.requires_grad or node not in steps or not is_free(node, graph):
        return None
    leaves: dict[fx.Node, None] = {}
    inside, todo = {node}, [node]
    while todo:
        for operand in todo.pop().all_input_nodes:
            if operand not in steps:
                leaves[operand] = None
            elif operand not in inside:
                inside.add(operand)
                todo.append(operand)
    val = node.meta["val"]
    if val.numel() < 2 or any(val.numel() < 2 * x.meta["val"].numel() for x in leaves):
        return None
    return recipe_of(node, inside, [*leaves], {}), [*leaves]


def logits_recipe(
    node: Any, graph: fx.Graph, context: Context
) -> tuple[Recipe, list[fx.Node]] | None:
    """How logits are made that nothing reads here: of hidden states and a head that is an input."""
    is_padded = context.length is not None  # what is returned is cut back to its length
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    if is_padded or not isinstance(val, Tensor):
        return None
    logits = logits_of(node, val.ndim - 1, records(node))
    if logits is None or not is_awaited(logits, context) or not is_free(node, graph):
        return None
    head = logits.head
    inside, leaves = set(logits.path), [head.hidden]
    for x in (head.weight, head.bias):
        while x is not None and x.target in RELAID:
            inside.add(x)
            x = x.args[0]
        leaves += [] if x is None else [x]
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    given = {x: i for i, x in inputs if i not in context.mutated}
    if any(x not in given for x in leaves[1:]):
        return None
    return recipe_of(node, inside, leaves, given), [x for x in leaves if x not in given]


#: What a head may go through before its product.
RELAID = (aten.t.default, aten.transpose.int, aten.permute.default, aten._to_copy.default)


def is_awaited(logits: Logits, context: Context) -> bool:
    """Whether their loss is made without them, or may be behind a break; and only outputs wait. A
    parameter whose gradients are shares may not be read outside of its graph."""
    users = (user for node in logits.path for user in node.users)
    if not all(user in logits.path or user.op == "output" for user in users):
        return False
    if context.spec.gives_shares and logits.head.weight.meta["needs_gradient"]:
        return False
    is_late = logits.head.node.meta.get("is_late", False)
    return is_late or (context.goes_on and logits.are_many(context.world.size))


def recipe_of(
    node: fx.Node, inside: set[fx.Node], leaves: Sequence[fx.Node], given: Mapping[fx.Node, int]
) -> Recipe:
    """The nodes ``inside`` as a program of ``leaves``, of which some are inputs of the graph."""
    refs: dict[fx.Node, Ref] = {leaf: Ref(i) for i, leaf in enumerate(leaves)}
    program: list[Step] = []
    for step in node.graph.nodes:
        if step in inside:
            args, kwargs = map_arg((step.args, step.kwargs), refs.__getitem__)
            refs[step] = Ref(max(len(leaves), 1) + len(program))  # what has no leaf gets one
            program.append(step_of(step.target, args, kwargs))
    vals = [(leaf.meta["val"], given.get(leaf)) for leaf in leaves]
    known = tuple(Leaf(tuple(x.shape), tuple(x.stride()), x.dtype, i) for x, i in vals)
    val = node.meta["val"]
    return Recipe(tuple(program), known, tuple(val.shape), val.dtype, val.device)


def is_free(node: Any, graph: fx.Graph) -> bool:
    """Whether nothing else that the program takes or gives is in the memory of this output."""
    if not isinstance(node, fx.Node):
        return False
    others: Sequence[Any] = (*graph.find_nodes(op="placeholder"), *graph.output_node().args[0])
    held = (n.meta.get("val") for n in others if isinstance(n, fx.Node) and n is not node)
    return not any(isinstance(x, Tensor) and is_alias(x, node.meta["val"]) for x in held)
