"""Collectives start as early and are waited for as late as the data allows.

Why it is legal. A functional collective is a start, which gives a buffer that may not be read yet,
and a wait, which gives the same buffer to its users. A start may stand anywhere behind its inputs
and a wait anywhere before its first user. The ranks must agree on the order of the starts alone, so
no start passes another one, and each rank moves the same starts: the graphs of the ranks differ in
sizes and not in structure.

An all-reduce that only the graph's outputs use (a parameter's gradient) is needed by nobody in the
graph. So of neighbours, with no other collective between them, all may start where the last one
does, as one coalesced all-reduce. Their sizes are the same on every rank, as they are sums of whole
tensors, and so is what shares a bucket.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from mosaic.graph.emit import insert
from mosaic.graph.sequence import is_start

#: A bucket is closed when it holds this much: the first must start while others are computed.
BUCKET_BYTES = 32 << 20

_c10d = torch.ops._c10d_functional


def overlap(graph: fx.Graph, context: Any) -> int:
    """Bucket, start early, wait late."""
    moved = sum(_coalesce(graph, bucket) for bucket in _buckets(_starts(graph)))
    moved += _start_early(graph)
    return moved + _wait_late(graph)


def _is_wait(node: fx.Node) -> bool:
    return node.target is _c10d.wait_tensor.default


def _starts(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if is_start(node)]


# --- order ----------------------------------------------------------------------------------


def _start_early(graph: fx.Graph) -> int:
    """Move each start up, to behind its inputs and the start before it."""
    moved = 0
    behind = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for start in _starts(graph):
        anchor = max([*behind, *start.all_input_nodes])
        if anchor.next is not start:
            anchor.append(start)
            moved += 1
        behind = [*behind[:1], start]
    return moved


def _wait_late(graph: fx.Graph) -> int:
    """Move each wait down, to before its first user."""
    moved = 0
    for wait in [node for node in reversed(graph.nodes) if _is_wait(node)]:
        first = min(wait.users) if wait.users else None
        if first is not None and wait.next is not first:
            first.prepend(wait)
            moved += 1
    return moved


# --- buckets --------------------------------------------------------------------------------


def _buckets(starts: list[fx.Node]) -> list[list[fx.Node]]:
    """Runs of two or more neighbouring all-reduces that fit into one."""
    buckets: list[list[fx.Node]] = []
    held = 0  # bytes, in the last bucket
    for before, start in pairwise([None, *starts]):
        if (
            before is not None
            and buckets
            and buckets[-1][-1] is before
            and _fits(before, start, held)
        ):
            buckets[-1].append(start)
            held += start.meta["val"].nbytes
        elif _is_leaf(start):
            buckets.append([start])
            held = start.meta["val"].nbytes
    return [bucket for bucket in buckets if len(bucket) > 1]


def _fits(before: fx.Node, start: fx.Node, held: int) -> bool:
    return (
        _is_leaf(start)
        and start.args[1:] == before.args[1:]
        and start.meta["val"].dtype == before.meta["val"].dtype
        and start.meta["val"].device == before.meta["val"].device
        and held < BUCKET_BYTES
    )


def _is_leaf(start: fx.Node) -> bool:
    """An all-reduce that is waited for once, for the outputs alone."""
    if start.target is not _c10d.all_reduce.default or len(start.users) != 1:
        return False
    (wait,) = start.users
    return _is_wait(wait) and all(user.op == "output" for user in wait.users)


def _coalesce(graph: fx.Graph, bucket: list[fx.Node]) -> int:
    """One collective, where the last of the bucket stands; ``_wait_late`` moves the waits."""
    last = bucket[-1]
    waits = [next(iter(start.users)) for start in bucket]
    with graph.inserting_before(last):
        inputs = [start.args[0] for start in bucket]
        target = _c10d.all_reduce_coalesced.default
        numbers = [start.meta.get("number") for start in bucket]
        args = (inputs, *last.args[1:])
        together = insert(graph, last, target, args, meta={"number": numbers})
        for index, (start, wait) in enumerate(zip(bucket, waits, strict=True)):
            part = insert(graph, start, operator.getitem, (together, index))
            wait.args = (part,)  # a new wait would mean a walk over all of the graph's outputs
            last.prepend(wait)
            graph.erase_node(start)
    return len(bucket)
