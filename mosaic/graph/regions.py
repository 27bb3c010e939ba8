"""Equal regions of a graph become one subgraph, which is called wherever one of them was.

What an attention is lowered to is the same in every layer of a model. Inductor, which spends most
of a compilation on it, then compiles it once. Nothing is lost on the border of a region but fused
copies: kernels and collectives read what is in memory.

    a = all_to_all(k0); ... o0 = merge(...)        o0 = invoke_subgraph(region_0, q0, k0, v0)
    b = all_to_all(k1); ... o1 = merge(...)   ->   o1 = invoke_subgraph(region_0, q1, k1, v1)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mosaic.graph.ops import is_effect
from mosaic.graph.sequence import is_start
from mosaic.torch_private import invoke_subgraph

#: In ``node.meta``: the name of the node that this one was written for, with others.
REGION = "region"
#: What has fewer nodes is compiled as quickly as a call of it.
LEAST = 24


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes that were written for one, what they read, and which of them others read."""

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[fx.Node]) -> Region:
        own = dict.fromkeys(nodes)
        read = dict.fromkeys(x for node in own for x in node.all_input_nodes if x not in own)
        used = (node for node in own if any(user not in own for user in node.users))
        return cls(tuple(own), tuple(read), tuple(used))

    @property
    def text(self) -> str:
        """What its compiled form depends on: that of equal regions is equal."""
        names = {node: f"%{i}" for i, node in enumerate((*self.operands, *self.nodes))}
        lines = [facts(node.meta["val"]) for node in self.operands]
        for node in self.nodes:
            args = map_arg((node.args, node.kwargs), lambda x: names[x])
            lines.append(f"{node.target} {args} {facts(node.meta['val'])}")
        return "\n".join([*lines, *(names[node] for node in self.outputs)])

    @property
    def gives_own_memory(self) -> bool:
        """Whether no output is a view of an operand, or of the same tensor as another output."""
        bases = [base_of(node) for node in self.outputs]
        return len(set(bases)) == len(bases) and not set(bases).intersection(self.operands)

    def graph(self) -> fx.Graph:
        """A graph of its own, from operands to outputs."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.operands:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta["val"] = node.meta["val"]
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        output = graph.output(tuple(copies[node] for node in self.outputs))
        output.meta["user_visible_output_idxs"] = list(range(len(self.outputs)))
        return graph


Unit: TypeAlias = fx.Node | Region


def facts(val: Any) -> str:
    """Of a node's value."""
    if isinstance(val, (tuple, list)):
        return str([facts(x) for x in val])
    if not isinstance(val, Tensor):
        return str(val)
    return f"{val.dtype} {tuple(val.shape)} {val.stride()} {val.device}"


def base_of(node: fx.Node) -> fx.Node:
    """What a view is of, and a wait for."""
    while isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns
        aliases = bool(returned) and returned[0].alias_info is not None
        is_wait = node.target is torch.ops._c10d_functional.wait_tensor.default
        if not (aliases or is_wait):
            return node
        node = node.args[0]
    return base_of(node.args[0]) if node.target is operator.getitem else node


def repeats_once(module: fx.GraphModule) -> fx.GraphModule:
    """The same program, with regions that are equal as calls of one subgraph."""
    names: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if REGION in node.meta:
            names.setdefault(node.meta[REGION], []).append(node)
    regions = [Region.of(nodes) for nodes in names.values() if len(nodes) >= LEAST]
    kinds: dict[str, list[Region]] = {}
    for region in regions:
        if region.gives_own_memory:
            kinds.setdefault(region.text, []).append(region)
    called: dict[Region, str] = {}
    for number, same in enumerate(same for same in kinds.values() if len(same) > 1):
        setattr(module, f"region_{number}", fx.GraphModule({}, same[0].graph()))
        called.update(dict.fromkeys(same, f"region_{number}"))
    order = ordered(module.graph, list(called)) if called else None
    return module if order is None else written(module, order, called)


def ordered(graph: fx.Graph, regions: Sequence[Region]) -> list[Unit] | None:
    """Nodes and regions, none before what it reads; collectives, and what has an effect, stay in
    their order. None where a region and what is not in it wait for each other."""
    owners: dict[fx.Node, Unit] = {node: region for region in regions for node in region.nodes}
    place: dict[Unit, int] = {}
    behind: dict[Unit, set[Unit]] = {}
    started: list[Unit] = []
    since: list[Unit] = []  # the last node with an effect, and all that follow it
    for number, node in enumerate(graph.nodes):
        unit = owners.get(node, node)
        others = [owners.get(x, x) for x in node.all_input_nodes]
        if is_start(node):
            others += started[-1:]
            started.append(unit)
        acts = is_effect(node) or is_write(node)
        others += since if acts else since[:1]
        since = [unit] if acts else [*since, unit]
        behind.setdefault(unit, set()).update(x for x in others if x is not unit)
        if unit is node or not is_start(node):  # of a region they may stand long before it
            place.setdefault(unit, number)
    return sorted_by_place(behind, place)


def is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def sorted_by_place(behind: dict[Unit, set[Unit]], place: dict[Unit, int]) -> list[Unit] | None:
    """The first that may come, each time."""
    sorter = TopologicalSorter(behind)
    try:
        sorter.prepare()
    except CycleError:
        return None
    units = {number: unit for unit, number in place.items()}
    found: list[Unit] = []
    waiting: list[int] = []
    while sorter.is_active():
        for unit in sorter.get_ready():
            heappush(waiting, place[unit])
        found.append(units[heappop(waiting)])
        sorter.done(found[-1])
    return found


def written(
    module: fx.GraphModule, order: Sequence[Unit], names: dict[Region, str]
) -> fx.GraphModule:
    """The units in this order, a region as a call of the subgraph of this name."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for unit in order:
        if isinstance(unit, fx.Node):
            copies[unit] = graph.node_copy(unit, copies.__getitem__)
            continue
        subgraph = graph.get_attr(names[unit])
        args = (subgraph, names[unit], *(copies[node] for node in unit.operands))
        call = graph.call_function(invoke_subgraph, args)
        call.meta["val"] = tuple(node.meta["val"] for node in unit.outputs)
        for i, node in enumerate(unit.outputs):
            copies[node] = graph.call_function(operator.getitem, (call, i))
            copies[node].meta.update(node.meta)
    made = fx.GraphModule(module, graph)
    made.meta.update(module.meta)
    return made
