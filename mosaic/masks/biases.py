"""Whether a bias may hide keys, as an added mask does, or only tells the seen ones apart."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mosaic.masks.additive import INF, WHERE, additive
from mosaic.masks.constants import Constants
from mosaic.masks.products import PRODUCTS
from mosaic.masks.softmax import LOW, Step
from mosaic.masks.terms import Term, broadcast

aten = torch.ops.aten
FILLS = {*WHERE, aten.masked_fill.Scalar, aten.masked_fill.Tensor}
HUGE = -1e30
LEARNED = {
    *PRODUCTS,
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.embedding.default,
}


def is_mild(bias: fx.Node, constants: Constants) -> bool:
    """Made of products, parameters and positions: like the scores themselves, never ``LOW``."""
    todo, seen = [bias], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        known = constants(node)
        if known is not None:
            if not (known > LOW).all():
                return False
        elif node.op == "placeholder":
            if not node.meta.get("is_state"):
                return False
        elif node.op != "call_function" or node.target in FILLS:
            return False
        elif node.target not in LEARNED:
            todo += numbers_of(node)
    return True


def hides_by_inf(mask: Term, constants: Constants) -> bool:
    """Whether a float mask hides keys by -inf alone, and is mild where it does not."""
    if not mask.node.meta["val"].is_floating_point():
        return False
    found = additive(mask, constants)
    return found.fill == -INF and all(is_mild(term.node, constants) for term in found.biases)


def may_be_lowest(bias: fx.Node, constants: Constants) -> bool:
    """Whether it may hold -inf, or a number so low that no score can be told from it."""
    todo, seen = [bias], set()
    while todo:
        node = todo.pop()
        known = constants(node)
        if known is not None:
            if (known <= HUGE).any():
                return True
        elif node.op == "placeholder":
            if node.meta["val"].is_floating_point() and not node.meta.get("is_state"):
                return True
        elif any(isinstance(x, float) and abs(x) >= -HUGE for x in node.args):
            return True
        elif node.target not in LEARNED:
            new = [x for x in numbers_of(node) if x not in seen]
            todo += new
            seen.update(new)
    return False


def numbers_of(node: fx.Node) -> list[fx.Node]:
    """What a node computes with. An index says which number, not how low it is."""
    inputs = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    numbers = [x for x in inputs if x.meta["val"].is_floating_point()]
    return numbers or inputs


def hides_fully(bias: Step, constants: Constants) -> bool:
    """Whether it hides by -inf and the lowest number alone, and is mild where it does not."""
    known = constants(bias.node)
    if known is not None:
        return bool(((known > LOW) | (known <= torch.finfo(known.dtype).min)).all())
    found = additive(broadcast(bias.node, len(bias.lead) + 2), constants)
    return all(is_mild(term.node, constants) for term in found.biases)
