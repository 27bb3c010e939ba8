"""Prints graphs, for goldens, errors and docs: ASCII, deterministic, no alignment.

    # y = F.scaled_dot_product_attention(q, k, v)
    y: f64[2, 1, 11/sp, 4] = scaled_dot_product_attention(q, k, v)

One line per node, under the user's line of code. ``11/sp`` is a dim whose 11 indices are cut over
the mesh axis sp, ``2*11/sp`` one that holds them twice. Places stand on the global graph only; on a
rank's own graph the sizes are that rank's.
"""

from __future__ import annotations

import difflib
import json
import operator
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mosaic.capture import Input
from mosaic.context import Context
from mosaic.layout import Layout, Place, Shard
from mosaic.modes import set_modes
from mosaic.source import code
from mosaic.spec import path_parts

SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "b8"}
NAMESPACES = ("aten", "_c10d_functional", "prims", "builtin")
SAID_BY_THE_VALUE = ("dtype", "layout", "device", "pin_memory")
FOREVER = 2**63 - 1


def listing(graph: fx.Graph, context: Context | None = None, *, fold_waits: bool = False) -> str:
    """One line per node. ``context`` gives names to parameters and process groups.

    ``fold_waits``: a collective and the wait for it are one line, where it starts.
    """
    printer = Printer(labels(graph, context, fold_waits), groups(context))
    hidden = left_out(graph, context, fold_waits)
    lines, last = [], ""
    for node in graph.nodes:
        if node in hidden:
            continue
        said = code(node) if node.op == "call_function" else ""
        if said and said != last:
            lines.append(f"# {said}")
            last = said
        lines.append(printer.line(node))
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def diff(before: str, after: str) -> str:
    """What changed from one listing to another, with a line of context; ``...`` stands for the rest."""
    found = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
    lines = ["..." if line.startswith("@@") else line for line in list(found)[2:]]
    return "\n".join(lines[1:])


# --- names ------------------------------------------------------------------------------------


def labels(graph: fx.Graph, context: Context | None, fold_waits: bool) -> dict[fx.Node, str]:
    """What each node is called: inputs as the user calls them, the others by their node's name."""
    inputs = inputs_of(graph, context)
    out: dict[fx.Node, str] = {}
    for node in graph.nodes:
        folded = fold_waits and is_wait(node)
        own = path_of(inputs[node]) if node in inputs else node.name
        out[node] = out[node.args[0]] if folded else own
    return out


def inputs_of(graph: fx.Graph, context: Context | None) -> dict[fx.Node, Input]:
    """The placeholders that are inputs of the user's function; AOTAutograd numbers those."""
    found = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        lowered = re.fullmatch(r"primals_(\d+)", node.name)
        if context is not None and (lowered or node.name.startswith("arg")):
            found[node] = context.inputs[int(lowered[1]) - 1 if lowered else index]
    return found


def path_of(given: Input) -> str:
    """``blocks.0.norm1.weight`` for Dynamo's source of a parameter."""
    skipped = ("L", "G", "self", "_modules", "_parameters", "_buffers")
    return ".".join(part for part in path_parts(given.source) if part not in skipped)


def groups(context: Context | None) -> dict[str, str]:
    """Group names are counters; a mesh axis says more."""
    return {context.world.group: context.world.mesh_axis} if context else {}


# --- which nodes ------------------------------------------------------------------------------


def left_out(graph: fx.Graph, context: Context | None, fold_waits: bool) -> set[fx.Node]:
    """Parameters are named where they are used; modes are switched everywhere."""
    state = {node for node, given in inputs_of(graph, context).items() if given.is_state}
    waits = {node for node in graph.nodes if fold_waits and is_wait(node)}
    return state | waits | set(graph.find_nodes(op="call_function", target=set_modes))


def is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


# --- one line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Printer:
    labels: dict[fx.Node, str]
    groups: dict[str, str] = field(default_factory=dict)

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.text(node.args[0])}"
        head = f"{self.labels[node]}: {typed(node.meta.get('val'), node.meta.get('place'))}"
        if node.op != "call_function":
            return head
        return f"{head} = {self.call(node)}{noted(node)}"

    def call(self, node: fx.Node) -> str:
        name, args = op_name(node.target), node.args
        if node.target is operator.getitem:
            return f"{self.text(args[0])}[{args[1]}]"
        if name in ("slice", "select"):
            return f"{self.text(args[0])}[{indexed(name, *args)}]"
        if name == "all_to_all_single":
            return self.exchange(*args)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in SAID_BY_THE_VALUE}
        shown = [self.text(a) for a in args] + [f"{k}={self.text(v)}" for k, v in kwargs.items()]
        return f"{name}({', '.join(shown)})"

    def exchange(self, x: fx.Node, receive: list[int], send: list[int], group: str) -> str:
        """An all-to-all in which everybody has one peer to send to is a shift."""
        to, source = ([peer for peer, n in enumerate(splits) if n] for splits in (send, receive))
        if len(to) <= 1 and len(source) <= 1:
            ends = [f"{w}={p[0]}" for w, p in (("to", to), ("from", source)) if p]
            return f"shift({', '.join([self.text(x), *ends, self.text(group)])})"
        return f"all_to_all({self.text(x)}, receive={receive}, send={send}, {self.text(group)})"

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.labels[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.text(v) for v in value)}]"
        if isinstance(value, str):
            return self.groups.get(value) or decoded(value)
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, torch.dtype):
            return short(value)
        return str(value).removeprefix("torch.")


def op_name(target: Any) -> str:
    """``torch.ops.aten.add.Tensor`` -> ``add``; ``torch.ops.mosaic.gather.default`` -> ``mosaic.gather``."""
    if not hasattr(target, "namespace"):
        return getattr(target, "__name__", str(target))
    namespace, name = target.name().split(".")[0].split("::")
    return name if namespace in NAMESPACES else f"{namespace}.{name}"


def indexed(
    name: str, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    """A slice (or select) as one would write it: ``:, 0:6``."""
    before = [":"] * (dim % x.meta["val"].ndim)
    if name == "select":
        return ", ".join([*before, str(start)])
    stop = "" if end is None or end >= FOREVER else str(end)
    return ", ".join([*before, f"{start or ''}:{stop}" + (f":{step}" if step != 1 else "")])


def typed(val: Any, place: Any = None) -> str:
    """``f64[2, 11/sp, 5]``; the layout stands behind it unless it is the even one."""
    if isinstance(val, (tuple, list)):
        places = place if isinstance(place, tuple) else (place,) * len(val)
        return f"({', '.join(typed(v, p) for v, p in zip(val, places, strict=True))})"
    if not isinstance(val, torch.Tensor):
        return type(val).__name__ if val is not None else "None"
    sizes = [str(int(s)) for s in val.shape]
    behind = ""
    if isinstance(place, Place):
        sizes[place.dim] = cut(place)
        is_even = place.layout == Layout.even(place.layout.n, place.layout.p)
        behind = "" if is_even else f" | {place.layout}"
    return f"{short(val.dtype)}[{', '.join(sizes)}]{behind}"


def cut(place: Place) -> str:
    """``11/sp``, ``2*11/sp``, ``11/sp*3``."""
    outer = f"{place.outer}*" if place.outer != 1 else ""
    inner = f"*{place.inner}" if place.inner != 1 else ""
    return f"{outer}{place.layout.n}/{place.mesh_axis}{inner}"


def short(dtype: torch.dtype) -> str:
    """``f64``, ``bf16``, ``i64``, ``b8``."""
    word, bits = re.fullmatch(r"torch\.([a-z]+)(.*)", str(dtype)).groups()  # type: ignore[union-attr]
    return SHORT.get(word, word) + bits


def noted(node: fx.Node) -> str:
    """What passes decided about an attention."""
    found = [node.meta[key] for key in ("method", "mask") if node.meta.get(key)]
    if "attention" in node.meta:
        decided = node.meta["attention"]
        found = [decided.method, f"{decided.query.n} x {decided.key.n}"]
    return f"  # {', '.join(found)}" if found else ""


def decoded(text: str) -> str:
    """The strings in which passes write down layouts and attentions, in short; others in quotes."""
    if text.startswith("{"):
        return attention_plan(json.loads(text))
    if "=" in text and text.count(" ") == 6:
        return f"shard({Shard.decode(text).place})"
    return repr(text)


def attention_plan(plan: dict[str, Any]) -> str:
    same = plan["query"] == plan["key"]
    layouts = [f"q,k={plan['query']}"] if same else [f"q={plan['query']}", f"k={plan['key']}"]
    words = [plan["method"], *(["causal"] if plan["causal"] else []), *layouts]
    words.append(f"scale={plan['scale']:.4g}")
    words += [f"dropout={plan['dropout']:.4g}"] if plan["dropout"] else []
    return f"plan({' '.join(words)})"
