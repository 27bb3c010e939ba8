"""Prints graphs, for goldens, errors and docs: ASCII, deterministic, nothing aligned.

    # y = F.scaled_dot_product_attention(q, k, v)
    y: f64[2, 1, 11/sp, 4] = sdpa(q, k, v)

One line per node, wrapped where it is long, under the user's line of code. ``11/sp`` is a dim whose
11 indices are cut over the mesh axis sp, ``2*11/sp`` one that holds them twice. Places are known on
the global graph only; on a rank's own graph sizes are that rank's.
"""

from __future__ import annotations

import difflib
import operator
import re
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from mosaic.api.spec import path_parts
from mosaic.attention.heads import HeadExchange
from mosaic.attention.plan import AttentionPlan
from mosaic.graph.inputs import Input
from mosaic.graph.modes import set_modes
from mosaic.graph.source import code
from mosaic.layout import Layout, Place, Shard
from mosaic.partition.context import Context

NAMESPACES = ("aten", "_c10d_functional", "prims")  # not worth writing
LONG = {
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "scaled_dot_product_attention": "sdpa",
    "all_to_all_single": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "wait_tensor": "wait",
}
SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "b8"}
SAID_BY_THE_VALUE = ("dtype", "layout", "device", "pin_memory", "memory_format")
RESHAPED = ("view", "_unsafe_view", "reshape", "expand")  # their sizes stand in front of them
VIEWS = (*RESHAPED, *"alias clone detach permute squeeze t transpose unsqueeze".split())
FOREVER = 2**63 - 1
WIDTH = 98  # a line of a diff then has 99
UNBROKEN: dict[str, Any] = {
    "subsequent_indent": "    ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


def listing(
    graph: fx.Graph,
    context: Context | None = None,
    *,
    fold_waits: bool = False,
    brief: bool = False,
) -> str:
    """One line per node; ``context`` gives names to parameters and process groups.

    ``fold_waits``: a collective and the wait for it are one line, where it starts. ``brief``: views
    have no line but the name of what they look at (an index counts in the view's dims), and
    elementwise ops in a row share one line.
    """
    shown = Listing(graph, context, fold_waits, brief)
    lines, last = [], ""
    for nodes in shown.groups():
        said = code(nodes[0]) if nodes[0].op == "call_function" else ""
        if said and said != last:
            lines.append(f"# {said}")
            last = said
        line = shown.line(nodes[0]) if len(nodes) == 1 else shown.fused(nodes)
        lines += wrapped(line)
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def diff(before: str, after: str) -> str:
    """What changed between two listings, with a line of context; ``...`` is what did not."""
    old, new = (text.replace("\n    ", " ").splitlines() for text in (before, after))
    lines: list[str] = []
    for line in list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]:
        sign, rest = line[0], line[1:]
        lines += ["..."] if sign == "@" else [sign + part for part in wrapped(rest)]
    return "\n".join(lines[1:])


def wrapped(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(line, WIDTH, **UNBROKEN)


def inputs_of(graph: fx.Graph, context: Context | None) -> dict[fx.Node, Input]:
    """The placeholders that are inputs of the user's function; AOTAutograd numbers those, and puts
    the program's constants in front."""
    if context is None:
        return {}
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        trained, other = (re.fullmatch(p, node.name) for p in (r"primals_(\d+)", r"arg(\d+)_1"))
        number = int(trained[1]) - 1 if trained else int(other[1]) if other else -1
        if number >= context.constants:
            found[node] = context.inputs[number - context.constants]
    return found


class Listing:
    """What each node of a graph is called, and which nodes have no line of their own."""

    def __init__(self, graph: fx.Graph, context: Context | None, fold_waits: bool, brief: bool):
        worlds = (context.world, *context.worlds) if context else ()
        self.mesh_axes = {world.group: world.mesh_axis for world in worlds}
        self.brief = brief
        self.hidden: set[fx.Node] = set()
        self.labels: dict[fx.Node, str] = {}
        self.graph = graph
        inputs = inputs_of(graph, context)
        for node in graph.nodes:
            own = path_of(inputs[node]) if node in inputs else shortened(node.name)
            folded = self.folded(node, fold_waits)
            self.labels[node] = own if folded is None else folded
            # Parameters are named where they are used, and modes are switched everywhere.
            is_parameter = node in inputs and inputs[node].is_state
            if folded is not None or is_parameter or node.target is set_modes:
                self.hidden.add(node)

    def folded(self, node: Any, fold_waits: bool) -> str | None:
        """What a node is called that has no line: as what it waits for or looks at."""
        if fold_waits and node.target is torch.ops._c10d_functional.wait_tensor.default:
            return self.labels[node.args[0]]
        if not self.brief or node.op != "call_function":
            return None
        name = op_name(node.target)
        if name == "full":
            return self.text(node.args[1])
        if is_view(node):
            return self.labels[node.args[0]]
        return self.call(node) if name in ("getitem", "slice", "select") else None

    def groups(self) -> Iterator[list[fx.Node]]:
        """Nodes that share a line."""
        run: list[fx.Node] = []
        for node in self.graph.nodes:
            if node in self.hidden:
                continue
            if run and not (is_elementwise(node) and code(node) == code(run[0])):
                yield run
                run = []
            run.append(node)
            if not (self.brief and is_elementwise(node)):
                yield run
                run = []
        if run:
            yield run

    # --- one line ---------------------------------------------------------------------------

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.text(node.args[0])}"
        head = self.head(node)
        if node.op != "call_function":
            return head
        return f"{head} = {self.call(node)}{decisions(node)}"

    def head(self, node: fx.Node) -> str:
        return f"{self.labels[node]}: {typed(node.meta.get('val'), *places(node))}"

    def fused(self, run: list[fx.Node]) -> str:
        """``c: f64[3], d: f64[3] = fused[sub exp add](a, b)``."""
        inside = set(run)
        results = [n for n in run if not self.readers(n) <= inside or not self.readers(n)]
        read = [self.labels[whole(n)] for node in run for n in node.all_input_nodes]
        own = {self.labels[n] for n in run}
        arguments = [x for x in dict.fromkeys(read) if x not in own and not is_number(x)]
        ops = [op_name(n.target) for n in run]
        words = " ".join(ops) if len(ops) < 5 else f"{' '.join(ops[:2])} .. {len(ops)} ops"
        heads = ", ".join(self.head(n) for n in results)
        return f"{heads} = fused[{words}]({', '.join(arguments)})"

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """Who reads a node, also through what has no line."""
        found: set[fx.Node] = set()
        todo = list(node.users)
        while todo:
            user = todo.pop()
            if user in self.hidden:
                todo += user.users
            else:
                found.add(user)
        return found

    # --- one call ---------------------------------------------------------------------------

    def call(self, node: fx.Node) -> str:
        name = op_name(node.target)
        args: Any = node.args
        if node.target is operator.getitem:
            return f"{self.text(args[0])}[{args[1]}]"
        if name in ("slice", "select"):
            return f"{self.text(args[0])}[{indexed(name, *args)}]"
        if name == "all_to_all_single":
            return self.exchange(*args)
        given = [("", args[0])] if name in RESHAPED else arguments(node)
        words = [f"{k}={self.text(v)}" if k not in ("", "plan") else self.text(v) for k, v in given]
        return f"{shortened(name)}({', '.join(words)})"

    def exchange(self, x: fx.Node, receive: list[int], send: list[int], group: str) -> str:
        """An all-to-all in which nobody has two peers is a shift."""
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
            return self.mesh_axes.get(value) or decoded(value)
        if isinstance(value, float):
            return f"{value:.4g}"
        return short(value) if isinstance(value, torch.dtype) else str(value)


# --- words --------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def op_name(target: Any) -> str:
    """``add`` for ``torch.ops.aten.add.Tensor``, ``mosaic.gather`` for an op of ours."""
    if not hasattr(target, "namespace"):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.removeprefix(f"{target.namespace}::")
    return name if target.namespace in NAMESPACES else f"{target.namespace}.{name}"


def arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """(keyword or "", value) without the defaults; by keyword behind one that is left out."""
    schema = node.target._schema.arguments if hasattr(node.target, "_schema") else ()
    given: list[tuple[str, Any]] = []
    for index, value in enumerate(node.args):
        no_leaves = index < len(schema) and schema[index].name == "leaves" and not value
        if not no_leaves and (index >= len(schema) or value != schema[index].default_value):
            given.append((schema[index].name if len(given) < index else "", value))
    return given + [(k, v) for k, v in node.kwargs.items() if k not in SAID_BY_THE_VALUE]


def shortened(name: str) -> str:
    for long, short_name in LONG.items():
        name = name.replace(long, short_name)
    return name


def path_of(given: Input) -> str:
    """``blocks.0.norm1.weight`` for Dynamo's source of a parameter."""
    skipped = ("L", "G", "self", "_modules", "_parameters", "_buffers")
    return ".".join(part for part in path_parts(given.source) if part not in skipped)


def is_elementwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def whole(node: Any) -> fx.Node:
    """The tuple that ``node`` is an item of."""
    while is_view(node):
        node = node.args[0]
    return node.args[0] if node.target is operator.getitem else node


def is_number(label: str) -> bool:
    return re.fullmatch(r"-?[\d.]+|-?inf", label) is not None


def is_view(node: Any) -> bool:
    """Whether a node holds what its operand holds, each number once, perhaps in another shape."""
    if node.op != "call_function" or op_name(node.target) not in (*VIEWS, "slice"):
        return False  # an input may be called "view"
    if op_name(node.target) not in ("slice", "expand"):
        return True
    return node.meta["val"].numel() == node.args[0].meta["val"].numel()


def indexed(
    name: str, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    """A slice (or select) as one would write it: ``:, 0:6``."""
    before = [":"] * (dim % x.meta["val"].ndim)
    if name == "select":
        return ", ".join([*before, str(start)])
    stop = "" if end is None or end >= FOREVER else str(end)
    return ", ".join([*before, f"{start or ''}:{stop}" + (f":{step}" if step != 1 else "")])


def places(node: fx.Node) -> list[Any]:
    """Where the sharded axes are in a node of the global graph."""
    return [place for place in node.meta.get("places", ()) if place]


def typed(val: Any, *places: Any) -> str:
    """``f64[2, 11/sp, 5]``; the layout stands behind it unless it is the even one."""
    if isinstance(val, (tuple, list)):
        each = [p if isinstance(p, tuple) else (p,) * len(val) for p in places]
        return f"({', '.join(typed(v, *p) for v, *p in zip(val, *each, strict=True))})"
    if not isinstance(val, torch.Tensor):
        return type(val).__name__
    sizes = [[str(int(s))] for s in val.shape]
    behind = ""
    for place in places:
        if not isinstance(place, Place):
            continue
        size = sizes[place.dim]
        size[:] = [cut(place)] if size == [str(place.size)] else [*size, cut(place)]
        is_even = place.layout == Layout.even(place.layout.n, place.layout.p)
        behind += "" if is_even else f" | {place.layout}"
    shown = ", ".join(" & ".join(size) for size in sizes)
    return f"{short(val.dtype)}[{shown}]{behind}"


def cut(place: Place) -> str:
    """``11/sp``, ``2*11/sp``, ``11/sp*3``."""
    outer = f"{place.outer}*" if place.outer != 1 else ""
    inner = f"*{place.inner}" if place.inner != 1 else ""
    return f"{outer}{place.layout.n}/{place.mesh_axis}{inner}"


def short(dtype: torch.dtype) -> str:
    """``f64``, ``bf16``, ``i64``, ``b8``."""
    found = re.fullmatch(r"torch\.([a-z]+)(.*)", str(dtype))
    assert found
    word, bits = found.groups()
    return SHORT.get(word, word) + bits


def decisions(node: fx.Node) -> str:
    """What passes decided about an attention."""
    problem, parts = node.meta.get("problem"), node.meta.get("attention")
    found = [str(problem.strategy)] if problem else []
    found += [node.meta["mask"]] if node.meta.get("mask") else []
    found += [f"{parts[0].query.n} x {parts[0].key.n}"] if parts else []
    return f"  # {', '.join(found)}" if found else ""


def decoded(text: str) -> str:
    """The strings in which passes write down layouts and attentions, in short; others in quotes."""
    if text.startswith('{"strategy"'):
        return attention_plan(AttentionPlan.decode(text))
    if text.startswith('{"slot"'):
        exchange = HeadExchange.decode(text)
        return f"heads({exchange.slot} of {exchange.u}, {' '.join(map(str, exchange.layouts))})"
    if re.match(r"\d+=", text) and text.count(" ") == 6:
        return f"shard({Shard.decode(text).place})"
    return repr(text)


def attention_plan(plan: AttentionPlan) -> str:
    """``plan(ring(stages=2) causal q,k=37=0:10|10:20|20:30|30:37 scale=0.5)``."""
    same = plan.query == plan.key
    layouts = [f"q,k={plan.query}"] if same else [f"q={plan.query}", f"k={plan.key}"]
    words = [str(plan.strategy), *([str(plan.band)] if str(plan.band) else []), *layouts]
    words.append(f"scale={plan.scale:.4g}")
    words += [f"dropout={plan.dropout:.4g}"] if plan.dropout else []
    words += [f"tile=({plan.tile})"] if plan.tile else []
    words += [f"scores=({plan.scores})"] if plan.scores else []
    return f"plan({' '.join(words)})"
