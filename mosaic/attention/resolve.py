"""From a method, as users write it, to a strategy: every number filled in, or an error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

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
from mosaic.attention.cost import Shape, cost_of, size
from mosaic.attention.strategy import LOCAL, SPLIT_KV, Level, Strategy
from mosaic.attention.timing import milliseconds, seconds_of
from mosaic.layout import Layout

#: A visiting portion of keys and values grows no larger than this, in bytes, by itself: links reach
#: their full rate well below it, and memory is what a ring is for.
PORTION = 256 << 20


@dataclass(frozen=True)
class Facts:
    """What a method's numbers depend on: global facts about one attention.

    ``p`` ranks share the axis; ``sizes``: the mesh axes and their sizes, in order. ``has_rows``: a
    dense mask with a row for each query, which stays with its rows. ``heads_are_cut``: by another
    axis. ``node_size``: how many neighbouring ranks share a node, 0 for all; ``memory``: a
    device's, in bytes, 0 where it does not matter.
    """

    p: int
    shape: Shape
    has_rows: bool = False
    heads_are_cut: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    node_size: int = 0
    memory: int = 0

    @property
    def heads(self) -> int:
        return self.shape.heads

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def kv_share(self) -> int:
        """Bytes of one rank's keys and values."""
        return self.shape.kv_bytes // self.p


def way_between(method: Method, facts: Facts, query: Layout, key: Layout) -> tuple[Strategy, str]:
    """How queries attend to keys of these layouts: local where every rank has all keys, split-KV
    where it has all queries, else what ``way_of`` says. Raises ShardingError as that does."""
    if not key.is_cut:
        return LOCAL, ""
    return way_of(method, facts) if query.is_cut else (SPLIT_KV, "")


def way_of(method: Method, facts: Facts) -> tuple[Strategy, str]:
    """How ``method`` is carried out, and a note where it had to be handed over to another one.

    Raises ShardingError where its numbers do not fit the ranks.
    """
    way, note = RESOLVE[type(method)](method, facts)
    moves_queries = way.heads > 1 or way.inter.cols > 1 or way.intra.cols > 1
    if facts.has_rows and moves_queries:
        instead = ring(facts)
        return instead, f"{way.name} is done by {instead.name}: a dense mask stays with its queries"
    return way, note


def ring(facts: Facts, stages: int | str = "auto") -> Strategy:
    """Keys visit in so many stages, "auto": in the quickest number that needs no large portions."""
    p = facts.p
    if stages == "auto":
        return min((ring(facts, k) for k in _stages(facts)), key=partial(_seconds, facts))
    assert isinstance(stages, int)
    if stages > p:
        raise ShardingError(
            f"Ring(stages={stages}) on {p} ranks: there are no more stages than ranks",
            fix=f'use 1 to {p}, or "auto"',
        )
    return Strategy(f"ring(stages={stages})", intra=Level(p, 1, stages))


def _stages(facts: Facts) -> list[int]:
    """Numbers of stages to choose from: in equal portions, and none too large."""
    p = facts.p
    others = [k for k in range(1, p) if (p - 1) % k == 0 or k <= 4]
    small = [k for k in others if facts.kv_share * -(-(p - 1) // k) <= PORTION]
    return [1 + k for k in small] or [p]


def _seconds(facts: Facts, way: Strategy) -> float:
    return seconds_of(way, facts.shape, facts.p, facts.node_size).total


def after_heads(facts: Facts, u: int) -> Facts:
    """What is left to do when ``u`` ranks have exchanged sequence for heads."""
    heads, kv_heads = facts.heads // u, max(1, facts.kv_heads // u)
    shape = replace(facts.shape, heads=heads, kv_heads=kv_heads)
    node_size = max(1, facts.node_size // u) if facts.node_size else 0
    return replace(facts, p=facts.p // u, shape=shape, node_size=node_size)


def _ring(method: Ring, facts: Facts) -> tuple[Strategy, str]:
    dtype = "" if method.grad_dtype is None else str(method.grad_dtype).removeprefix("torch.")
    return replace(ring(facts, method.stages), grad_dtype=dtype), ""


def _all_gather(method: AllGather, facts: Facts) -> tuple[Strategy, str]:
    return replace(ring(facts, 1), name="all_gather"), ""


def _mesh2d(method: Mesh2D, facts: Facts) -> tuple[Strategy, str]:
    rows, cols = method.rows, method.cols
    if rows * cols != facts.p:
        raise ShardingError(
            f"Mesh2D({rows}, {cols}) does not fit {facts.p} ranks",
            sizes=f"{rows} x {cols} = {rows * cols}, ranks = {facts.p}",
            fix="choose rows x cols equal to the ranks of the mesh axis",
        )
    return Strategy(f"mesh2d({rows}, {cols})", intra=Level(rows, cols)), ""


def head_groups(facts: Facts, p: int) -> int:
    """The most ranks (a divisor of p) among which heads can be cut; KV heads that are fewer are
    sent to several ranks."""
    fits = (
        u
        for u in range(p, 0, -1)
        if p % u == 0
        and facts.heads % u == 0
        and (facts.kv_heads % u == 0 or u % facts.kv_heads == 0)
    )
    return 1 if facts.heads_are_cut else next(fits)


def why_no_heads(facts: Facts) -> str:
    if facts.heads_are_cut:
        return "another axis cuts the heads"
    return f"{facts.heads} heads and {facts.kv_heads} KV heads do not divide by it"


def _ulysses(method: Ulysses, facts: Facts) -> tuple[Strategy, str]:
    u, p = head_groups(facts, facts.p), facts.p
    if u == p:
        return Strategy(f"ulysses({p})", heads=p), ""
    rest = ring(after_heads(facts, u))
    if u == 1:
        return rest, f"ulysses({p}) is done by {rest.name}: {why_no_heads(facts)}"
    way = replace(rest, name=f"ulysses({u}) x {rest.name}", heads=u)
    return way, f"ulysses({p}) is done by {way.name}: {why_no_heads(facts)}"


def squarest(n: int, facts: Facts) -> tuple[int, int]:
    """rows x cols = n that send least: cols near sqrt(n kv_heads / heads), as K and V of grouped
    heads are smaller than Q and the output."""
    ideal = math.sqrt(n * facts.kv_heads / facts.heads)
    cols = min((c for c in range(1, n + 1) if n % c == 0), key=lambda c: abs(math.log(c / ideal)))
    return n // cols, cols


def _hierarchical(method: Hierarchical, facts: Facts) -> tuple[Strategy, str]:
    w, p = method.intra_node_size, facts.p
    if p % w:
        raise ShardingError(
            f"Hierarchical({w}) does not divide {p} ranks into nodes",
            sizes=f"{p} = {p // w} x {w} + {p % w}",
            fix="choose a node size that divides the ranks of the mesh axis",
        )
    nodes, note, heads, left = p // w, "", 1, w
    if method.intra == "ulysses":
        heads = head_groups(facts, w)
        left = w // heads
        if left > 1:
            note = f"ulysses({w}) in a node is done by {heads} x {left}: {why_no_heads(facts)}"
    stages = w if method.intra == "ring" else 1
    grid = squarest(w, facts) if method.intra == "mesh2d" else (left, 1)
    between = squarest(nodes, facts) if method.inter == "mesh2d" else (nodes, 1)
    inter = Level(*between, stages=nodes if method.inter == "ring" else 1)
    name = f"hierarchical({w}, {method.intra}, {method.inter})"
    return Strategy(name, heads=heads, inter=inter, intra=Level(*grid, stages=stages)), note


def _composed(method: Composed, facts: Facts) -> tuple[Strategy, str]:
    sizes = dict(facts.sizes)
    u = sizes[method.heads.mesh]
    if head_groups(facts, u) != u:
        rest = ring(facts)
        return rest, f"ulysses({u}) and more is done by {rest.name}: {why_no_heads(facts)}"
    way, note = way_of(method.sequence, after_heads(facts, u))
    name = f"ulysses({u}) x {way.name}"
    order = list(sizes)  # ranks are numbered in the order of the mesh
    is_outer = order.index(method.heads.mesh) < order.index(method.sequence.mesh)
    return replace(way, name=name, heads=u, is_outer=is_outer), note


def _folded(method: Folded, facts: Facts) -> tuple[Strategy, str]:
    heads, sequence = method.shape
    if heads * sequence != facts.p:
        raise ShardingError(
            f"mesh_shape = {method.shape} does not fit {facts.p} ranks",
            sizes=f"{heads} x {sequence} = {heads * sequence}, ranks = {facts.p}",
            fix="choose heads x sequence equal to the ranks of the mesh axis",
        )
    names = method.composed.mesh.split(",")
    sizes = tuple(zip(names, method.shape, strict=True))
    return _composed(method.composed, replace(facts, sizes=sizes))


def _local(method: Local, facts: Facts) -> tuple[Strategy, str]:
    return LOCAL, ""


def _auto(method: Auto, facts: Facts) -> tuple[Strategy, str]:
    """The quickest way that fits into memory; of equals the simpler one, which comes first."""
    ways = list(dict.fromkeys(way_of(m, facts)[0] for m in alternatives(facts)))
    costs = {way: cost_of(way, facts.shape, facts.p) for way in ways}
    bound = facts.memory / 4 or math.inf
    fitting = [way for way in ways if costs[way].memory <= bound]
    fitting = fitting or [min(ways, key=lambda way: costs[way].memory)]
    best, *others = sorted(fitting, key=partial(_seconds, facts))
    said = [
        f"{way}: {milliseconds(_seconds(facts, way))}, "
        f"{size(costs[way].forward + costs[way].backward)} sent"
        for way in (best, *others[:1])
    ]
    return best, f"auto: {'; next best '.join(said)}"


def alternatives(facts: Facts) -> list[Method]:
    """What ``p`` ranks allow, simple methods first; what cannot be done exactly is a ring."""
    p, w = facts.p, facts.node_size
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
