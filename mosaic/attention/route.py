"""All hops of one rank's attention, with what travels in each: keys that a rank's queries do not
see are not sent to it, where the mask is known when compiling (a window, fixed blocks).

What one rank sees of another's is left out exactly, unless that helps nobody: in zigzag a causal
mask hides half of some chunks, and the busiest rank gets all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce

from mosaic.attention.blocks import reach
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.schedule import Hop, Window, schedule
from mosaic.attention.transfer import Side, Transfer
from mosaic.layout import Intervals, Layout, common, united


@dataclass(frozen=True)
class Stop:
    """Keys on a visit: the two hops that brought them, and whether they are the window's last."""

    window: Transfer
    step: Transfer
    is_last: bool

    @property
    def keys(self) -> Intervals:
        return self.step.after.ranks[self.step.side.rank]


@dataclass(frozen=True)
class Route:
    """All hops of one rank's attention, with their layouts."""

    queries: Transfer
    stops: tuple[Stop, ...]

    @property
    def rows(self) -> Intervals:
        """Whose queries are attended here."""
        return self.queries.after.ranks[self.queries.side.rank]


@lru_cache(maxsize=128)
def route_of(plan: AttentionPlan) -> Route:
    hops, side = schedule(plan.strategy, plan.p), plan.side
    queries = Transfer(side, hops.queries, plan.query)
    wanted = wanted_by(plan)
    halo = None if wanted is None else gathered(wanted, hops.queries)
    stops = []
    for window in hops.windows:
        near = None if halo is None else gathered(halo, passed_on(window, plan.p))
        to_node = transfer(side, window.hop, plan.key, near)
        steps = [transfer(side, hop, to_node.after, halo) for hop in window.steps]
        steps = [step for step in steps if not step.is_silent]
        stops += [Stop(to_node, step, step is steps[-1]) for step in steps]
    return Route(queries, tuple(stops))


def wanted_by(plan: AttentionPlan) -> Layout | None:
    """Of all keys those that each rank's own queries may see; None where each sees some of every
    rank's, and nothing but causality says which."""
    n, band = plan.key.n, plan.band
    if plan.seen is None and band.left is None and band.right is None:
        return None
    held = [reach(rows, band, n) for rows in plan.query.ranks]
    if plan.seen is not None:
        held = [common(a, b) for a, b in zip(held, plan.seen.ranks, strict=True)]
    elif band.left is None and len(plan.key.holders(reduce(common, held))) == plan.p:
        return None
    return Layout(n, tuple(held))


def gathered(wanted: Layout, hop: Hop) -> Layout:
    """What each rank wants for all those whose numbers ``hop`` gives it."""
    each = (united(i for source in sources for i in wanted.ranks[source]) for sources in hop)
    return Layout(wanted.n, tuple(each))


def passed_on(window: Window, p: int) -> Hop:
    """To whom each rank's chunks go within the node, itself included."""
    to: list[set[int]] = [{rank} for rank in range(p)]
    for hop in window.steps:
        for receiver, sources in enumerate(hop):
            for source in sources:
                to[source].add(receiver)
    return tuple(tuple(sorted(ranks)) for ranks in to)


def transfer(side: Side, hop: Hop, before: Layout, halo: Layout | None) -> Transfer:
    """One that leaves out what is not wanted, where somebody then gets nothing of another's, or
    the busiest rank less; of an all-gather, the fastest collective there is, only the latter."""
    whole = Transfer(side, hop, before)
    if halo is None or whole.is_identity:
        return whole
    fewer = Transfer(side, hop, before, halo)
    ranks = range(before.p)
    if busiest(fewer) < busiest(whole):
        return fewer
    drops = any(len(fewer.parts(rank)) < len(whole.parts(rank)) for rank in ranks)
    return fewer if drops and not whole.is_gather else whole


def busiest(hop: Transfer) -> int:
    """The most rows that a rank gets of others."""
    return max(rows_from_others(hop, rank) for rank in range(hop.before.p))


def rows_from_others(hop: Transfer, receiver: int) -> int:
    parts = hop.parts(receiver)
    return sum(i.length for source, held in parts if source != receiver for i in held)


def rows_sent(hops: Iterable[Transfer], p: int) -> list[int]:
    """How many rows each rank sends to others in all of them."""
    sent = [0] * p
    for hop in hops:
        for receiver in range(p):
            for source, held in hop.parts(receiver):
                if source != receiver:
                    sent[source] += sum(interval.length for interval in held)
    return sent
