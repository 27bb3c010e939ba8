"""One attention of a program at its global size, and what was decided about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mosaic.api.errors import UnsupportedError
from mosaic.api.methods import AllGather, Local, Method, Ring, Ulysses
from mosaic.attention.blocks import FULL, Band, share_seen
from mosaic.attention.keys_seen import KeysSeen
from mosaic.attention.strategy import LOCAL, Strategy
from mosaic.layout import Interval, Layout, Place
from mosaic.runtime.world import World


@dataclass(frozen=True)
class AttentionProblem:
    """Global facts, the same on every rank.

    q is (batch, heads, query.n, dim), k (batch, kv_heads, key.n, dim), v (batch, kv_heads, key.n,
    v_dim), of numbers with ``itemsize`` bytes. ``query`` and ``key`` say which positions each rank
    of ``mesh`` holds; query i sees keys i - band.left ... i + band.right. ``has_rows``: a dense
    mask has a row for each query; ``tile``: the program that makes one tile by tile; ``scores``:
    one that changes scores; ``mask``: all of it in words; ``dense``: why no kernel computes it pair
    by pair, or "". ``axes``: the sharded axes that are attended over; an axis that cuts batches or
    heads is in ``batch_cut`` or ``heads_cut``, and ``batch`` and ``heads`` are what it leaves.
    """

    query: Layout
    key: Layout
    batch: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    itemsize: int
    band: Band = FULL
    documents: bool = False
    has_rows: bool = False
    tile: str = ""
    scores: str = ""
    mask: str = ""
    dense: str = ""
    scale: float = 1.0
    dropout: float = 0.0
    site: int = 0
    axes: tuple[str, ...] = ()
    mesh: str = "sp"
    method: Method = field(default_factory=Local)
    batch_cut: Place | None = None
    heads_cut: Place | None = None
    strategy: Strategy = LOCAL
    seen: KeysSeen | None = None

    @property
    def p(self) -> int:
        """How many ranks share it."""
        return self.key.p

    @property
    def axis(self) -> str:
        """``rows``, or ``rows x columns`` for both, flattened."""
        return " x ".join(self.axes)

    @property
    def causal(self) -> bool:
        return self.band[1] == 0

    @property
    def is_window(self) -> bool:
        """Whether what a query sees is no longer than a shard: even shards then work alike."""
        length = self.band.length
        return length is not None and length < self.key.n / self.p

    @property
    def kv_bytes(self) -> int:
        """Of all ranks' keys and values."""
        dims = self.dim + self.v_dim
        return self.batch * self.key.n * self.kv_heads * dims * self.itemsize

    @cached_property
    def flops(self) -> float:
        """Of the forward, of the query-key pairs that are seen; backward has 2.5 times as many."""
        seen = share_seen(self.band, self.query.n, self.key.n) * self.query.n * self.key.n
        if self.seen is not None:
            seen = min(seen, self.seen.pairs((Interval(0, self.query.n),)))
        pairs = self.batch * self.heads * seen
        return 2 * pairs * (self.dim + self.v_dim)

    def after_heads(self, u: int) -> AttentionProblem:
        """What is left to do when ``u`` ranks have exchanged sequence for heads."""
        left = self.p // u
        return replace(
            self,
            heads=self.heads // u,
            kv_heads=max(1, self.kv_heads // u),
            query=Layout.even(self.query.n, left),
            key=Layout.even(self.key.n, left),
        )

    def needs_as(self, other: AttentionProblem) -> bool:
        """Whether the strategy of one does the other."""

        def decisive(x: AttentionProblem) -> tuple[object, ...]:
            return x.axes, x.query, x.key, x.has_rows, x.heads_cut is None

        return decisive(self) == decisive(other)


def combined(
    parts: Sequence[AttentionProblem], worlds: Callable[[str], World], where: str
) -> AttentionProblem:
    """One attention from what each of several axes makes of it; ``worlds``: of a (joint) mesh axis.

    The first part knows the global sizes, the mask and dropout. Raises UnsupportedError where two
    axes cut batches (or heads) that are dropped from, and as ``flattened`` does.
    """
    first = parts[0]
    along = [part for part in parts if part.axes]
    found = (along or parts)[0]
    if len(along) > 1:
        found = flattened(along, worlds(",".join(part.mesh for part in along)), where)
    for part in parts:
        first = share(first, part)
    return replace(
        first,
        axes=found.axes,
        mesh=found.mesh,
        method=found.method,
        query=found.query,
        key=found.key,
        batch_cut=only_cut("batches", [x.batch_cut for x in parts], first.dropout, where),
        heads_cut=only_cut("heads", [x.heads_cut for x in parts], first.dropout, where),
    )


def only_cut(what: str, cuts: Sequence[Place | None], dropout: float, where: str) -> Place | None:
    """Which axis cuts batches (or heads); of several any one, but for dropout: that counts them."""
    found = [cut for cut in cuts if cut]
    if dropout and len(found) > 1:
        raise UnsupportedError(
            f"two axes cut the {what} of an attention with dropout",
            where=where,
            cuts="; ".join(map(str, found)),
            fix="give one of the axes the method 'local'",
        )
    return found[0] if found else None


def share(problem: AttentionProblem, cut: AttentionProblem) -> AttentionProblem:
    """The part of an attention that is left where an axis cuts its batches or heads."""
    if cut.heads_cut:
        p = cut.heads_cut.layout.p
        return replace(problem, heads=-(-problem.heads // p), kv_heads=-(-problem.kv_heads // p))
    if cut.batch_cut:
        return replace(problem, batch=-(-problem.batch // cut.batch_cut.layout.p))
    return problem


def flattened(along: Sequence[AttentionProblem], world: World, where: str) -> AttentionProblem:
    """An attention over several axes that share its dim: one layout over all ranks of them.

    Its method is that of the first axis where it has no numbers of its own, else a ring. Raises
    UnsupportedError where keys are cut along some axes only, or shards are not in order.
    """
    first = along[0]
    axes = tuple(name for part in along for name in part.axes)
    names = f"an attention over {' and '.join(map(repr, axes))}, flattened,"
    facts = {
        "where": where,
        "sizes": f"{first.query.n} queries, {first.key.n} keys",
        "fix": "give one of the axes the method 'local'",
    }
    if len({isinstance(part.method, Local) for part in along}) > 1:
        raise UnsupportedError(f"{names} has keys that only some of them cut", **facts)
    if not all(x.is_ascending for part in along for x in (part.query, part.key)):
        raise UnsupportedError(f"{names} has shards that are not in the order of the axis", **facts)
    keeps = isinstance(first.method, (Local, Ring, AllGather, Ulysses))
    method = first.method if keeps else Ring()
    ranks = world.along([part.mesh for part in along])
    return replace(
        first,
        axes=axes,
        mesh=world.mesh_axis,
        method=replace(method, mesh=world.mesh_axis),
        query=Layout.crossed([part.query for part in along], ranks),
        key=Layout.crossed([part.key for part in along], ranks),
    )
