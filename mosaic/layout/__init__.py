"""Who holds which indices of an axis: intervals, layouts and places. Pure Python, no torch.

Vocabulary, used in code, docs and messages:

axis       a named dimension of the user's program (``rows``)
mesh axis  a dimension of the device mesh (``sp``)
rank       one process of that mesh axis
layout     for every rank, the global intervals of an axis that it holds, in memory order
place      where an axis sits in one tensor: dim ``dim`` has size outer x layout.n x inner
whole      every rank has all of it
reshard    to change a layout

>>> print(Layout.even(37, 4))
37=0:10|10:20|20:30|30:37
>>> print(Layout.zigzag(16, 4))
16=0:2,14:16|2:4,12:14|4:6,10:12|6:10
>>> print(Layout.even(37, 4).slice(0, 26))
26=0:10|10:20|20:26|
"""

from mosaic.layout.combs import Comb, combs
from mosaic.layout.exchange import Exchange, exchange
from mosaic.layout.intervals import (
    Interval,
    Intervals,
    Run,
    common,
    cut,
    joined_runs,
    placed,
    united,
)
from mosaic.layout.layout import Layout
from mosaic.layout.placement import Place, Shard, held_rows_of

__all__ = [
    "Comb",
    "Exchange",
    "Interval",
    "Intervals",
    "Layout",
    "Place",
    "Run",
    "Shard",
    "combs",
    "common",
    "cut",
    "exchange",
    "held_rows_of",
    "joined_runs",
    "placed",
    "united",
]
