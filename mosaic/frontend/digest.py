"""What ranks compare of a graph before they run it: all that has to be the same on each of them."""

from __future__ import annotations

import re

import torch
from torch import fx

from mosaic.graph.modes import Modes
from mosaic.partition.context import Context
from mosaic.report.plan import Plan
from mosaic.runtime import agreement


def text_of(graph: fx.Graph) -> str:
    """A graph with its shapes, for the digest; every rank has a device of its own. A number that
    nothing reads is left out: Dynamo adds the size of a rank's part where that has changed, and on
    a rank where it has not it does not."""

    def line(node: fx.Node) -> str:
        text = node.name if node.op == "placeholder" else node.format_node()
        return f"{text} {getattr(node.meta.get('val'), 'shape', '')}"

    def is_unread_number(node: fx.Node) -> bool:
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        return node.op == "placeholder" and not node.users and not is_tensor

    lines = (line(node) for node in graph.nodes if not is_unread_number(node))
    return re.sub(r"\b(cuda|xpu):\d+", r"\1", "\n".join(lines))


def conditions(module: fx.GraphModule) -> str:
    """What decides, beside the graph, whether there is a backward, and in which dtypes."""
    inputs = (n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder"))
    tensors = (x for x in inputs if not isinstance(x, torch.SymInt))
    learned = (str(int(getattr(x, "requires_grad", False))) for x in tensors)
    return f"{Modes.current().encode()} requires_grad:{''.join(learned)}"


def plan_digest(context: Context, plan: Plan, modes: str) -> str:
    """Of a program and how it is cut."""
    decided = [str(a) for a in plan.attentions] + plan.collective_rows() + context.decided
    decided += [plan.axis, plan.layout]
    return agreement.digest(
        graph=context.graph_text,
        spec=context.spec.encode(),
        plan="\n".join(decided),
        modes=modes,
        versions=torch.__version__,
    )
