"""How long a strategy of attention takes, roughly: what "auto" compares.

Keys travel while the portion before them is attended to, and in backward the gradients of the one
before that as well; what has nothing to hide behind is waited for. Rates are those measured on
nodes of H200 with NVLink; other machines have others, but the order of methods changes little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mosaic.attention.cost import Pair, Sent, cost_of, home_factor
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.schedule import portions
from mosaic.attention.strategy import Level, Strategy

MIB = 1 << 20
#: Bytes, and the bytes per second at which so many travel.
Link = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Rates:
    """kernel: FLOP per second. hbm, network: bytes per second, the latter of one rank. launch:
    seconds that a kernel or a collective takes at least."""

    kernel: float = 600e12
    hbm: float = 4e12
    network: float = 45e9
    launch: float = 20e-6
    exchange: Link = ((4 * MIB, 26e9), (16 * MIB, 113e9), (64 * MIB, 151e9), (256 * MIB, 295e9))
    gather: Link = ((4 * MIB, 166e9), (16 * MIB, 260e9), (64 * MIB, 301e9), (256 * MIB, 326e9))

    def travel(self, sent: Pair, link: Link) -> float:
        """Seconds of one collective."""
        near, far = sent
        if near + far == 0:
            return 0
        return self.launch + max(near / rate(link, near), far / self.network)


H200 = Rates()


def rate(link: Link, size: float) -> float:
    """Between two measured sizes on a straight line over the logarithm of the size."""
    if size <= link[0][0]:
        return link[0][1]
    for (a, slow), (b, fast) in pairwise(link):
        if size <= b:
            return slow + (fast - slow) * math.log(size / a) / math.log(b / a)
    return link[-1][1]


class Seconds(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def milliseconds(seconds: float) -> str:
    """``0.25 ms``, ``12 ms``, ``6,600 ms``."""
    return f"{float(f'{seconds * 1e3:.2g}'):,g} ms"


def seconds_of(
    strategy: Strategy, problem: AttentionProblem, node_size: int = 0, rates: Rates = H200
) -> Seconds:
    """Of one attention. ``node_size``: how many neighbouring ranks share a node; 0 is all."""
    sent, cost, p = Sent.of(strategy, problem, node_size), cost_of(strategy, problem), problem.p
    exchanged = 2 * rates.travel(_times(sent.heads, 1 / 2), rates.exchange)
    queries = 2 * rates.travel(_times(sent.queries, 1 / 2), rates.exchange)
    again = 2 * rates.travel(_times(sent.queries, 1), rates.exchange)
    merges = cost.merges * (rates.launch + 3 * _partial(strategy, problem) / rates.hbm)
    work, home = problem.flops / p / rates.kernel, home_factor(strategy, problem)
    return Seconds(
        exchanged + queries + merges + _visits(strategy, sent, work, 0, p, rates),
        exchanged + again + merges + _visits(strategy, sent, 2.5 * work, home, p, rates),
    )


def _times(sent: Pair, factor: float) -> Pair:
    return sent[0] * factor, sent[1] * factor


def _partial(strategy: Strategy, x: AttentionProblem) -> float:
    """Bytes of an output in float32 of all queries that are attended on one rank."""
    rows = x.batch * x.heads * x.query.n / x.p * strategy.inter.cols * strategy.intra.cols
    return rows * x.v_dim * 4


def _visits(
    strategy: Strategy, sent: Sent, work: float, home: float, p: int, rates: Rates
) -> float:
    """Windows that travel between nodes, and in each the steps inside a node."""
    is_gather = strategy.intra.rows == p and strategy.intra.stages <= 2
    link = rates.gather if is_gather else rates.exchange

    def window(share: float) -> float:
        stages = _stages(strategy.intra)
        arrive = [rates.travel(_times(sent.steps, share * came), link) for _, came in stages]
        return pipelined(arrive, [rates.launch + work * share * done for done, _ in stages], home)

    stages = _stages(strategy.inter)
    arrive = [rates.travel(_times(sent.windows, came), rates.exchange) for _, came in stages]
    return pipelined(arrive, [window(done) for done, _ in stages], home)


def _stages(level: Level) -> list[tuple[float, float]]:
    """For each stage its share of the work, and of what travels."""
    chunks = [len(back) for back in portions(level)]
    if len(chunks) == 1:
        return [(1, 1)]
    return [(1 / level.rows, 0), *((m / level.rows, m / (level.rows - 1)) for m in chunks[1:])]


def pipelined(arrive: Sequence[float], work: Sequence[float], home: float) -> float:
    """While a stage is at work the next arrives and the gradients of the last one go home (in
    ``home`` times as long)."""
    back = [home * seconds for seconds in arrive]
    behind = [a + b for a, b in zip([*arrive[1:], 0], [0, *back[:-1]], strict=True)]
    return arrive[0] + sum(map(max, work, behind)) + back[-1]
