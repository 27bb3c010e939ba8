"""The collectives of a lowered graph, in the order in which they start.

All ranks must start the same ones in the same order, or they wait for each other for ever, or add
up what does not belong together. Each rank lowers a graph of its own, so this is not taken on
trust: the ranks compare their sequences before the first run (``agreement.agree_on_collectives``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from mosaic.graph.source import line

_c10d = torch.ops._c10d_functional


def is_start(node: fx.Node) -> bool:
    """A functional collective; the wait for it is another node."""
    namespace = getattr(node.target, "namespace", "")
    return namespace == "_c10d_functional" and node.target is not _c10d.wait_tensor.default


def sequence(graph: fx.Graph, mesh_axes: Mapping[str, str]) -> list[tuple[str, str]]:
    """What each collective is, and the user's line that it is for. ``mesh_axes``: by group."""
    return [(described(n, mesh_axes), line(n)) for n in graph.nodes if is_start(n)]


def described(start: fx.Node, mesh_axes: Mapping[str, str]) -> str:
    """``all_reduce(f32[5, 8], sum) over sp, number 3``. How an all-to-all is split differs between
    ranks; what else is sent has one size on all of them, unless another axis is cut as well: then
    the parts of that one may have several lengths."""
    given = start.args[0] if isinstance(start.args[0], (list, tuple)) else [start.args[0]]
    operands = [node.meta["val"] for node in given]
    name = start.target._opname
    fits = name != "all_to_all_single" and len(mesh_axes) < 2
    sent = [f"{x.dtype}{list(x.shape) if fits else ''}".removeprefix("torch.") for x in operands]
    words = [w for w in start.args[1:] if isinstance(w, str)]
    over = [mesh_axes[w] for w in words if w in mesh_axes] or ["another group"]
    how = [w for w in words if w not in mesh_axes and name.startswith("all_reduce")][:1]
    number = start.meta.get("number")
    return f"{name}({', '.join(sent + how)}) over {over[0]}, number {number}"
