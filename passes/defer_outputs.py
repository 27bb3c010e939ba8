"""A mask that other graphs of the same function read goes to them as what it is made of.

    same = eq(unsqueeze(ids, 2), unsqueeze(ids, 1))                  # (batch, n, n)
    return (h, same)      ->      return (h, ids), and a recipe: unsqueeze, unsqueeze, eq

Where the graph breaks every rank would have to hold its rows of n x n, and the attentions behind
the break could not read what the mask means. Legal because a recipe has no gradient, looks at one
element of each operand (or at none), and takes the values that its operands have here: what leaves
the graph in place of the mask is a ``DeferredTensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mosaic.graph.emit import drop_dead
from mosaic.graph.ops import differentiable, makes_patterns
from mosaic.partition.context import Context, Output
from mosaic.passes.normalize import is_random
from mosaic.runtime.deferred_tensor import Leaf, Recipe, Ref, Step, step_of
from mosaic.torch_private import is_alias


def defer_outputs(graph: fx.Graph, context: Context) -> int:
    if not context.goes_on or context.world.size == 1:
        return 0
    steps = steps_of(graph)
    written = len(context.mutated)
    nodes = graph.output_node().args[0]
    new, said = list(nodes[:written]), list(context.outputs[:written])
    for node, about in zip(nodes[written:], context.outputs[written:], strict=True):
        may_wait = is_free(node, graph) and not about.requires_grad
        found = recipe_of(node, steps) if may_wait else None
        recipe, leaves = found or (None, [node])
        context.recipes.append(recipe)
        new += leaves
        said += [Output()] * len(leaves) if recipe else [about]
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


def recipe_of(node: Any, steps: set[fx.Node]) -> tuple[Recipe, list[fx.Node]] | None:
    """How ``node`` is made, and of which nodes; None where these are not much smaller."""
    if node not in steps:
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
    vals = [leaf.meta["val"] for leaf in leaves]
    if val.numel() < 2 or any(val.numel() < 2 * x.numel() for x in vals):
        return None
    refs: dict[fx.Node, Ref] = {leaf: Ref(i) for i, leaf in enumerate(leaves)}
    program: list[Step] = []
    for step in node.graph.nodes:
        if step in inside:
            args, kwargs = map_arg((step.args, step.kwargs), refs.__getitem__)
            refs[step] = Ref(max(len(leaves), 1) + len(program))  # what has no leaf gets one
            program.append(step_of(step.target, args, kwargs))
    known = tuple(Leaf(tuple(x.shape), tuple(x.stride()), x.dtype) for x in vals)
    return Recipe(tuple(program), known, tuple(val.shape), val.dtype, val.device), list(leaves)


def is_free(node: Any, graph: fx.Graph) -> bool:
    """Whether nothing else that the program takes or gives is in the memory of this output."""
    if not isinstance(node, fx.Node):
        return False
    others: Sequence[Any] = (*graph.find_nodes(op="placeholder"), *graph.output_node().args[0])
    held = (n.meta.get("val") for n in others if isinstance(n, fx.Node) and n is not node)
    return not any(isinstance(x, Tensor) and is_alias(x, node.meta["val"]) for x in held)
