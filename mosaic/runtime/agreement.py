"""Ranks that disagree are found before a collective can hang, or before a wrong number comes out.

When a graph is compiled the ranks compare digests of what they are about to do, through the process
group's store: no collective, so nothing hangs. What they are given is compared by ``data_check``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch.distributed as dist

from mosaic.api.errors import MosaicError, ShardingError
from mosaic.runtime.mesh import MosaicContext
from mosaic.runtime.rendezvous import exchange

FINISH = "finish compiling this graph"


def digest(**facts: str) -> str:
    """A short hash of each fact, so that an error can say which one differs."""
    return json.dumps({k: hashlib.sha256(v.encode()).hexdigest()[:16] for k, v in facts.items()})


def agree(group: dist.ProcessGroup | None, facts: str) -> None:
    """Raise ShardingError, naming the ranks, if this is not what every rank of ``group`` says.

    A rank that fails before it gets here says so through ``report_failure``.
    """
    if group is None or dist.get_backend(group) == "fake":
        return
    _compare(
        dict(zip(dist.get_process_group_ranks(group), exchange(group, facts), strict=True)), facts
    )


def _compare(said: dict[int, str], mine: str) -> None:
    other = {rank: json.loads(text) for rank, text in said.items() if text != mine}
    if not other:
        return
    own = json.loads(mine)
    parts = sorted({k for facts in other.values() for k in own if facts.get(k) != own[k]})
    raise ShardingError(
        f"ranks {sorted(other)} compiled another program than rank {dist.get_rank()}",
        differs=", ".join(parts),
        fix="give every rank the same model, spec, versions and modes (no_grad, autocast, train or "
        "eval), and inputs of the same sizes",
    )


def agree_on_collectives(
    group: dist.ProcessGroup | None, sequences: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Raise MosaicError, naming both sides, unless every rank's forward and backward graph start
    the same collectives in the same order. ``sequences``: those of ``graph/sequence.py``, by graph.

    Also tells a rank that failed to lower or to compile its graph from one that is slow.
    """
    if group is None or dist.get_backend(group) == "fake":
        return
    kinds = {kind: [what for what, _ in steps] for kind, steps in sequences.items()}
    mine = digest(**{kind: "\n".join(steps) for kind, steps in kinds.items()})
    if set(exchange(group, mine, FINISH)) == {mine}:
        return
    # Every rank has seen the difference, and comes here.
    said = [json.loads(text) for text in exchange(group, json.dumps(sequences), FINISH)]
    ranks = dist.get_process_group_ranks(group)
    raise _different(dict(zip(ranks, said, strict=True)))


def _different(said: dict[int, dict[str, list[list[str]]]]) -> MosaicError:
    """The first step at which a rank does something else than the first rank."""
    (first, own), *others = said.items()
    for kind in own:
        for rank, theirs in others:
            pairs = zip_longest(own[kind], theirs.get(kind, []), fillvalue=["nothing", ""])
            for step, (mine, other) in enumerate(pairs, 1):
                if mine[0] != other[0]:
                    return MosaicError(
                        f"the ranks' {kind} graphs do not start the same collectives",
                        **{f"rank {first}, collective {step}": " ".join(mine).strip()},
                        **{f"rank {rank}, collective {step}": " ".join(other).strip()},
                        fix="this is a bug in Mosaic: please report the program; "
                        "without the op at that line it may work",
                    )
    return MosaicError(
        "the ranks compiled different graphs",
        graphs=[*map(list, said.values())],
        fix="run the same model, options and versions of torch and mosaic on all ranks",
    )


def check_shards_alike(
    context: MosaicContext, mesh_axis: str, shapes: tuple[tuple[int, ...], ...], dim: int
) -> None:
    """Raise ShardingError if shards without a layout are not of one shape on every rank."""
    said = [json.loads(s) for s in differing(context, mesh_axis, json.dumps(shapes), COMPARE)]
    if not said:
        return
    wrong = next(i for i in range(len(shapes)) if len({str(s[i]) for s in said}) > 1)
    everyone = [shape[wrong] for shape in said]
    n, p = sum(shape[dim] for shape in everyone), len(said)
    raise ShardingError(
        "the ranks hold shards of different sizes, and no layout says who holds what",
        sizes=", ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(everyone)),
        fix=f"if the axis is cut as torch.chunk does, pass layout=mosaic.Layout.even({n}, {p})",
    )


def check_calls_alike(context: MosaicContext, mesh_axis: str, asked: str) -> None:
    """Raise ShardingError if ranks ask for an attention by different methods, scales, windows."""
    said = differing(context, mesh_axis, asked, COMPARE_CALLS)
    if said:
        raise ShardingError(
            "the ranks ask for different attentions",
            **{f"rank {rank}": text for rank, text in enumerate(said)},
            fix="call mosaic.attention, and mosaic's modules, with the same arguments on all ranks",
        )


READ = "read what is cut"
READ_WITHIN = 180.0  # seconds; another rank may still compile


def check_together(context: MosaicContext, mesh_axis: str, op: str) -> None:
    """Raise ShardingError unless all ranks come to an op that makes something whole of parts."""
    group = context.group(mesh_axis)
    if group is None or context.size(mesh_axis) == 1 or dist.get_backend(group) == "fake":
        return
    said = exchange(group, op, READ, READ_WITHIN)
    if len(set(said)) > 1:
        raise ShardingError(
            "the ranks do different things with tensors that are cut",
            **{f"rank {rank}": text for rank, text in enumerate(said)},
        )


COMPARE, COMPARE_CALLS = "compare the sizes of its shards", "compare how it calls attention"
COMPARE_OPS = "compare an op on tensors that are cut"


def differing(context: MosaicContext, mesh_axis: str, text: str, doing: str) -> list[str]:
    """What every rank says, where one says something else; nothing where all agree.

    Asked once for each text. It goes through the store: a rank with another text, whose turn it is
    not on the others, meets no collective that is not its own.
    """
    group, question = context.group(mesh_axis), (mesh_axis, doing, text)
    if group is None or question in context.alike or dist.get_backend(group) == "fake":
        return []
    said = exchange(group, text, doing)
    if len(set(said)) > 1:
        return said
    context.alike.add(question)
    return []
