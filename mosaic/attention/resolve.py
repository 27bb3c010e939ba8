"""From a method, as users write it, to a strategy: every number filled in, or an error."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

from mosaic.api.errors import ShardingError
from mosaic.api.methods import (
    AllGather,
    Auto,
    Composed,
    Folded,
    Hierarchical,
    Inter,
    Intra,
    Local,
    Mesh2D,
    Method,
    Ring,
    Ulysses,
)
from mosaic.attention.cost import cost_of, size
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.strategy import LOCAL, SPLIT_KV, Level, Strategy
from mosaic.attention.timing import milliseconds, seconds_of
from mosaic.runtime.world import World, device_memory

#: A visiting portion of keys and values grows no larger than this, in bytes, by itself: links reach
#: their full rate well below it, and memory is what a ring is for.
PORTION = 256 << 20


class Machine(NamedTuple):
    """What a method's numbers depend on beside the attention: the mesh axes and their ``sizes``, in
    order; how many neighbouring ranks share a node, 0 for all; and a device's ``memory`` in bytes,
    0 where it does not matter."""

    sizes: tuple[tuple[str, int], ...] = ()
    node_size: int = 0
    memory: int = 0


ONE_NODE = Machine()


def machine_of(world: World) -> Machine:
    return Machine(tuple(world.sizes.items()), world.node_size, device_memory())


def resolve(method: Method, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    """How an attention is carried out: local where every rank has all keys, split-KV where it has
    all queries, else as its method says; and a note where that had to hand it over to another one.

    Raises ShardingError where the method's numbers do not fit the ranks.
    """
    if not problem.key.is_cut:
        return LOCAL, ""
    return strategy_of(method, problem, machine) if problem.query.is_cut else (SPLIT_KV, "")


def strategy_of(
    method: Method, problem: AttentionProblem, machine: Machine = ONE_NODE
) -> tuple[Strategy, str]:
    """``resolve``, of queries and keys that are cut alike."""
    found, note = RESOLVE[type(method)](method, problem, machine)
    moves_queries = found.heads > 1 or found.inter.cols > 1 or found.intra.cols > 1
    if problem.has_rows and moves_queries:
        instead = ring(problem, machine)
        why = "a dense mask stays with its queries"
        return instead, f"{found.name} is done by {instead.name}: {why}"
    return found, note


def ring(problem: AttentionProblem, machine: Machine, stages: int | str = "auto") -> Strategy:
    """Keys visit in so many stages, "auto": in the quickest number that needs no large portions."""
    p = problem.p
    if stages == "auto":
        some = (ring(problem, machine, k) for k in _stages(problem))
        return min(some, key=partial(_seconds, problem, machine))
    assert isinstance(stages, int)
    if stages > p:
        raise ShardingError(
            f"Ring(stages={stages}) on {p} ranks: there are no more stages than ranks",
            fix=f'use 1 to {p}, or "auto"',
        )
    return Strategy(f"ring(stages={stages})", intra=Level(p, 1, stages))


def _stages(problem: AttentionProblem) -> list[int]:
    """Numbers of stages to choose from: in equal portions, and none too large."""
    p = problem.p
    others = [k for k in range(1, p) if (p - 1) % k == 0 or k <= 4]
    small = [k for k in others if problem.kv_bytes // p * -(-(p - 1) // k) <= PORTION]
    return [1 + k for k in small] or [p]


def _seconds(problem: AttentionProblem, machine: Machine, strategy: Strategy) -> float:
    return seconds_of(strategy, problem, machine.node_size).total


def after_heads(
    problem: AttentionProblem, machine: Machine, u: int
) -> tuple[AttentionProblem, Machine]:
    """What is left to do when ``u`` ranks have exchanged sequence for heads."""
    node_size = max(1, machine.node_size // u) if machine.node_size else 0
    return problem.after_heads(u), machine._replace(node_size=node_size)


def _ring(method: Ring, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    dtype = "" if method.grad_dtype is None else str(method.grad_dtype).removeprefix("torch.")
    return replace(ring(problem, machine, method.stages), grad_dtype=dtype), ""


def _all_gather(
    method: AllGather, problem: AttentionProblem, machine: Machine
) -> tuple[Strategy, str]:
    return replace(ring(problem, machine, 1), name="all_gather"), ""


def _mesh2d(method: Mesh2D, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    rows, cols = method.rows, method.cols
    if rows * cols != problem.p:
        raise ShardingError(
            f"Mesh2D({rows}, {cols}) does not fit {problem.p} ranks",
            sizes=f"{rows} x {cols} = {rows * cols}, ranks = {problem.p}",
            fix="choose rows x cols equal to the ranks of the mesh axis",
        )
    return Strategy(f"mesh2d({rows}, {cols})", intra=Level(rows, cols)), ""


def head_groups(problem: AttentionProblem, p: int) -> int:
    """The most ranks (a divisor of p) among which heads can be cut; KV heads that are fewer are
    sent to several ranks."""
    fits = (
        u
        for u in range(p, 0, -1)
        if p % u == 0
        and problem.heads % u == 0
        and (problem.kv_heads % u == 0 or u % problem.kv_heads == 0)
    )
    return 1 if problem.heads_cut else next(fits)


def why_no_heads(problem: AttentionProblem) -> str:
    if problem.heads_cut:
        return "another axis cuts the heads"
    return f"{problem.heads} heads and {problem.kv_heads} KV heads do not divide by it"


def _ulysses(method: Ulysses, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    u, p = head_groups(problem, problem.p), problem.p
    if u == p:
        return Strategy(f"ulysses({p})", heads=p), ""
    rest = ring(*after_heads(problem, machine, u))
    if u == 1:
        return rest, f"ulysses({p}) is done by {rest.name}: {why_no_heads(problem)}"
    found = replace(rest, name=f"ulysses({u}) x {rest.name}", heads=u)
    return found, f"ulysses({p}) is done by {found.name}: {why_no_heads(problem)}"


def squarest(n: int, problem: AttentionProblem) -> tuple[int, int]:
    """rows x cols = n that send least: cols near sqrt(n kv_heads / heads), as K and V of grouped
    heads are smaller than Q and the output."""
    ideal = math.sqrt(n * problem.kv_heads / problem.heads)
    cols = min((c for c in range(1, n + 1) if n % c == 0), key=lambda c: abs(math.log(c / ideal)))
    return n // cols, cols


def _hierarchical(
    method: Hierarchical, problem: AttentionProblem, machine: Machine
) -> tuple[Strategy, str]:
    w, p = method.intra_node_size, problem.p
    if p % w:
        raise ShardingError(
            f"Hierarchical({w}) does not divide {p} ranks into nodes",
            sizes=f"{p} = {p // w} x {w} + {p % w}",
            fix="choose a node size that divides the ranks of the mesh axis",
        )
    nodes, note, heads, left = p // w, "", 1, w
    if method.intra == "ulysses":
        heads = head_groups(problem, w)
        left = w // heads
        if left > 1:
            note = f"ulysses({w}) in a node is done by {heads} x {left}: {why_no_heads(problem)}"
    stages = w if method.intra == "ring" else 1
    grid = squarest(w, problem) if method.intra == "mesh2d" else (left, 1)
    between = squarest(nodes, problem) if method.inter == "mesh2d" else (nodes, 1)
    inter = Level(*between, stages=nodes if method.inter == "ring" else 1)
    name = f"hierarchical({w}, {method.intra}, {method.inter})"
    return Strategy(name, heads=heads, inter=inter, intra=Level(*grid, stages=stages)), note


def _composed(
    method: Composed, problem: AttentionProblem, machine: Machine
) -> tuple[Strategy, str]:
    sizes = dict(machine.sizes)
    u = sizes[method.heads.mesh]
    if head_groups(problem, u) != u:
        rest = ring(problem, machine)
        return rest, f"ulysses({u}) and more is done by {rest.name}: {why_no_heads(problem)}"
    rest, note = strategy_of(method.sequence, *after_heads(problem, machine, u))
    name = f"ulysses({u}) x {rest.name}"
    order = list(sizes)  # ranks are numbered in the order of the mesh
    is_outer = order.index(method.heads.mesh) < order.index(method.sequence.mesh)
    return replace(rest, name=name, heads=u, is_outer=is_outer), note


def _folded(method: Folded, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    heads, sequence = method.shape
    if heads * sequence != problem.p:
        raise ShardingError(
            f"mesh_shape = {method.shape} does not fit {problem.p} ranks",
            sizes=f"{heads} x {sequence} = {heads * sequence}, ranks = {problem.p}",
            fix="choose heads x sequence equal to the ranks of the mesh axis",
        )
    names = method.composed.mesh.split(",")
    sizes = tuple(zip(names, method.shape, strict=True))
    return _composed(method.composed, problem, machine._replace(sizes=sizes))


def _local(method: Local, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    return LOCAL, ""


def _auto(method: Auto, problem: AttentionProblem, machine: Machine) -> tuple[Strategy, str]:
    """The quickest that fits into memory; of equals the simpler one, which comes first."""
    some = (strategy_of(m, problem, machine)[0] for m in alternatives(problem.p, machine.node_size))
    costs = {strategy: cost_of(strategy, problem) for strategy in some}
    bound = machine.memory / 4 or math.inf
    fitting = [strategy for strategy, cost in costs.items() if cost.memory <= bound]
    fitting = fitting or [min(costs, key=lambda strategy: costs[strategy].memory)]
    seconds = partial(_seconds, problem, machine)
    best, *others = sorted(fitting, key=seconds)
    said = [
        f"{strategy}: {milliseconds(seconds(strategy))}, "
        f"{size(costs[strategy].forward + costs[strategy].backward)} sent"
        for strategy in (best, *others[:1])
    ]
    return best, f"auto: {'; next best '.join(said)}"


def alternatives(p: int, w: int) -> list[Method]:
    """What ``p`` ranks in nodes of ``w`` allow, simple ones first; what is not exact is a ring."""
    found: list[Method] = [AllGather(), Ring(), Ulysses()]
    found += [Mesh2D(p // cols, cols) for cols in range(2, p + 1) if p % cols == 0]
    if 1 < w < p and p % w == 0:
        for inter in get_args(Inter):
            found += [Hierarchical(w, intra, inter) for intra in get_args(Intra)]
    return found


RESOLVE: dict[type[Method], Any] = {
    Local: _local,
    Auto: _auto,
    Ring: _ring,
    AllGather: _all_gather,
    Mesh2D: _mesh2d,
    Ulysses: _ulysses,
    Hierarchical: _hierarchical,
    Composed: _composed,
    Folded: _folded,
}
