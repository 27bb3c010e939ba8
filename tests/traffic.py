"""What one rank's attention sends and holds, read off its programs: no ranks are needed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic.attention import heads
from mosaic.attention.op import backward_program, calls_of, forward_program
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.strategy import Strategy
from mosaic.attention.visit import Inputs
from mosaic.layout import Layout
from mosaic.torch_private import decompositions_for_inductor, make_fx

c10d = torch.ops._c10d_functional
Program = Callable[..., tuple[Tensor, ...]]


class Call(NamedTuple):
    """A program and fake tensors for it."""

    program: Program
    tensors: tuple[Tensor, ...]

    def sent(self, p: int, rank: int = 1) -> list[float]:
        """For each collective the bytes that go to other ranks."""
        with Recorder(p, rank) as found:
            self.program(*self.tensors)
        return found.sent

    def graph(self) -> fx.Graph:
        """As ``lower_attention`` writes it."""
        traced = make_fx(self.program, decomposition_table=decompositions_for_inductor())
        graph = traced(*self.tensors).graph
        graph.eliminate_dead_code()
        return graph


def calls(
    strategy: Strategy,
    given: AttentionProblem,
    dtype: torch.dtype = torch.float64,
    rank: int = 1,
    device: str = "meta",
) -> tuple[Call, Call]:
    """The forward and the backward of one attention on ``rank``. Other devices than "meta" (which
    has no kernel but plain matrix products) need a FakeTensorMode."""
    key, query = given.key, given.query
    query = Layout.whole(query.n, given.p) if strategy.everywhere else query
    seen = None if given.seen is None else given.seen.layout(query)
    plan = AttentionPlan(strategy, rank, "sp", query, key, given.band, seen=seen)
    specs = calls_of(plan, given.heads, given.kv_heads)
    lengths = query.lengths[rank], key.lengths[rank]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """out, and what is kept for backward."""
        if not specs.there:
            out, lse = forward_program(q, k, v, *Inputs(), specs.attention)
            return out, q, k, v, out, lse
        q, k, v = heads.program([q, k, v], specs.there, True)
        out, lse = forward_program(q, k, v, *Inputs(), specs.attention)
        return (*heads.program([out], specs.back, False), q, k, v, out, lse)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        if specs.back:
            (dout,) = heads.program([dout], specs.back, True)
        grads = backward_program(dout, q, k, v, *Inputs(), out, lse, specs.attention, False)[:3]
        return tuple(heads.program(grads, specs.there, False)) if specs.there else grads

    shapes = [(given.heads, lengths[0], given.dim), (given.kv_heads, lengths[1], given.dim)]
    shapes.append((given.kv_heads, lengths[1], given.v_dim))
    inputs = tuple(torch.empty(given.batch, *shape, dtype=dtype, device=device) for shape in shapes)
    out, *saved = forward(*inputs)
    return Call(forward, inputs), Call(backward, (torch.empty_like(out), *saved))


# --- what leaves the rank -----------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Collects what each collective sends to other ranks."""

    def __init__(self, p: int, rank: int):
        super().__init__()
        self.p, self.rank = p, rank
        self.sent: list[float] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "_c10d_functional" and op is not c10d.wait_tensor.default:
            self.sent.append(self.part_to_others(op, *args) * bytes_of(args[0]))
        return op(*args, **(kwargs or {}))

    def part_to_others(self, op: Any, x: Tensor, *args: Any) -> float:
        if op is c10d.all_gather_into_tensor.default:
            return self.p - 1
        if op is c10d.all_reduce.default:
            return 2 * (self.p - 1) / self.p
        assert op is c10d.all_to_all_single.default, op
        splits = args[1]
        assert sum(splits) == x.shape[0]
        return 1 - splits[self.rank] / max(sum(splits), 1)


def bytes_of(x: Any) -> int:
    if isinstance(x, (tuple, list)):
        return sum(map(bytes_of, x))
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


# --- what is held -------------------------------------------------------------------------------


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory this one looks at."""
    while is_view(node):
        node = node.args[0]
    return node


def is_view(node: fx.Node) -> bool:
    if node.target in (operator.getitem, c10d.wait_tensor.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.returns[0].alias_info is not None


def held(graph: fx.Graph) -> int:
    """The most bytes at once beside inputs and outputs, each until its last use."""
    nodes = list(graph.nodes)
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        for used in [node, *node.all_input_nodes]:
            last[storage(used)] = index
    (output,) = graph.find_nodes(op="output")
    outside = {storage(x) for x in output.all_input_nodes}
    live, most, ends = 0, 0, dict.fromkeys(range(len(nodes)), 0)
    for index, node in enumerate(nodes):
        is_made = node.op == "call_function" and storage(node) is node and node not in outside
        if is_made:
            size = bytes_of(node.meta["val"])
            live += size
            ends[last[node]] += size
        most = max(most, live)
        live -= ends[index]
    return most
