"""A program for all lengths of a bucket: rows behind the length are kept out of what is real.

    # length: int64, 33 to 64
    m = mean(x, [1])            ->   real = lt(arange(64), length)
                                     m = div(sum(where(real, x, 0), [1]), length)
    sdpa(q, k, v)               ->   sdpa(q, k, v, real)            causal ones stay as they are

Legal because what is real is then made of what is real: each op either does not mix rows, or its
padding is masked (``mosaic/padding``). Padding holds copies of a last row, so what is computed of
it is as finite as what is real, and its gradient is 0.
"""

from __future__ import annotations

from torch import fx

from mosaic.graph.lengths import NotPaddedError
from mosaic.padding.follow import Follower
from mosaic.padding.rules import HANDLERS
from mosaic.partition.context import Context


def mask_padding(graph: fx.Graph, context: Context) -> int:
    length = context.length
    if length is None:
        return 0
    follower = Follower(graph, length, HANDLERS)
    follower.run()
    outputs = graph.output_node().args[0]
    found = [follower.places[n] if isinstance(n, fx.Node) else () for n in outputs]
    written = len(context.mutated)
    if any(found[:written]) or not all(isinstance(places, tuple) for places in found):
        raise NotPaddedError("the program writes to an input that is padded")
    context.output_rows = found[written:]
    first, last = max(length.bucket.low + 1, length.least), length.bucket.high
    context.notes.append(f"one program for lengths {first} to {last} of axis {length.axis!r}")
    return follower.rewrites
