"""Ranks that disagree are found before a collective can hang, or before a wrong number comes out.

When a graph is compiled the ranks compare digests of what they are about to do, through the process
group's store: no collective, so nothing hangs. When it first runs they compare checksums of whole
inputs and parameters: the commonest mistake is a sampler that gives every rank other data.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from mosaic.capture import Input
from mosaic.errors import MosaicError, ShardingError
from mosaic.mesh import MosaicContext
from mosaic.torch_private import default_store

TIMEOUT = timedelta(seconds=30)
FINISH = "finish compiling this graph"
FAILED = "failed: "
_compiles: dict[str, int] = defaultdict(int)


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


def exchange(
    group: dist.ProcessGroup,
    text: str,
    doing: str = "compile this graph",
    patience: timedelta | None = None,
) -> list[str]:
    """What every rank of the group says, in rank order, through the store."""
    store, ranks, prefix = default_store(), dist.get_process_group_ranks(group), _key(group, doing)
    patience = patience or TIMEOUT
    _compiles[prefix] += 1
    keys = {rank: f"{prefix}/{_compiles[prefix]}/{rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], text)
    try:
        store.wait(list(keys.values()), patience)
    except (RuntimeError, dist.DistError):
        time = f"{doing.split()[0]} {_compiles[prefix]}"
        late = [rank for rank, key in keys.items() if not store.check([key])]
        raise ShardingError(
            f"ranks {late} did not {doing} within {patience.seconds} s",
            ranks=f"this is rank {dist.get_rank()} of {ranks}, {time}",
            fix="every rank must run the same program with inputs of the same sizes",
        ) from None
    said = {rank: store.get(key).decode() for rank, key in keys.items()}
    for rank, words in said.items():
        if words.startswith(FAILED):
            raise MosaicError(
                f"rank {rank} could not compile this graph", reason=words.removeprefix(FAILED)
            )
    return list(said.values())


def _key(group: dist.ProcessGroup, doing: str = "compile this graph") -> str:
    return f"mosaic/{doing}/" + "-".join(map(str, dist.get_process_group_ranks(group)))


def report_failure(
    group: dist.ProcessGroup | None, error: BaseException, doing: str = "compile this graph"
) -> None:
    """Tell the others at once, so that they do not wait for this rank."""
    if group is None or dist.get_backend(group) == "fake":
        return
    prefix = _key(group, doing)
    _compiles[prefix] += 1
    store = default_store()
    store.set(f"{prefix}/{_compiles[prefix]}/{dist.get_rank()}", f"{FAILED}{error}")


def _compare(said: dict[int, str], mine: str) -> None:
    other = {rank: json.loads(text) for rank, text in said.items() if text != mine}
    if not other:
        return
    own = json.loads(mine)
    parts = sorted({k for facts in other.values() for k in own if facts.get(k) != own[k]})
    raise ShardingError(
        f"ranks {sorted(other)} compiled another program than rank {dist.get_rank()}",
        differs=", ".join(parts),
        fix="give every rank the same model, spec, versions, and inputs of the same sizes",
    )


def agree_on_collectives(
    group: dist.ProcessGroup | None, sequences: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Raise MosaicError, naming both sides, unless every rank's forward and backward graph start
    the same collectives in the same order. ``sequences``: those of ``mosaic.sequence``, by graph.

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
                        **{f"rank {first}, collective {step}": " ".join(mine)},
                        **{f"rank {rank}, collective {step}": " ".join(other)},
                        fix="this is a bug in Mosaic: please report the program; "
                        "without the op at that line it may work",
                    )
    return MosaicError("the ranks compiled different graphs", graphs=[*map(list, said.values())])


def check_data(group: dist.ProcessGroup, given: Sequence[tuple[Input, Any]]) -> None:
    """Compare checksums of the graph's whole inputs across the ranks; one small all-gather."""
    pairs = [(i, v) for i, v in given if isinstance(v, torch.Tensor)]
    if not pairs:
        return
    device = pairs[0][1].device
    sums = torch.stack([checksum(v).to(device) for _, v in pairs])
    everyone = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, sums, group)
    differ = [
        (i, [r for r, theirs in enumerate(everyone) if not same(theirs[row], sums[row])])
        for row, (i, _) in enumerate(pairs)
    ]
    wrong = [(i, ranks) for i, ranks in differ if ranks]
    if not wrong:
        return
    first, ranks = wrong[0]
    what = "parameter or buffer" if first.is_state else "argument"
    raise ShardingError(
        f"ranks of one sequence-parallel group were given different data: {what} {first.name}",
        ranks=f"{ranks} differ from rank {dist.get_rank(group)}",
        fix=SAME_STATE if first.is_state else SAME_DATA,
    )


def check_shards_alike(
    context: MosaicContext, mesh_axis: str, shapes: tuple[tuple[int, ...], ...], dim: int
) -> None:
    """Raise ShardingError if shards without a layout are not of one shape on every rank.

    Asked once for each shape. It goes through the store: a rank with another shape, whose turn it
    is not on the others, is told so after a while, and meets no collective that is not its own.
    """
    group, question = context.group(mesh_axis), (mesh_axis, shapes)
    if group is None or question in context.alike or dist.get_backend(group) == "fake":
        return
    said = [json.loads(text) for text in exchange(group, json.dumps(shapes), COMPARE, PATIENCE)]
    wrong = next((i for i in range(len(shapes)) if len({str(s[i]) for s in said}) > 1), None)
    if wrong is None:
        context.alike.add(question)
        return
    everyone = [shape[wrong] for shape in said]
    n, p = sum(shape[dim] for shape in everyone), len(said)
    raise ShardingError(
        "the ranks hold shards of different sizes, and no layout says who holds what",
        sizes=", ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(everyone)),
        fix=f"if the axis is cut as torch.chunk does, pass layout=mosaic.Layout.even({n}, {p})",
    )


COMPARE = "compare the sizes of its shards"
PATIENCE = timedelta(minutes=5)  # ranks may come to their first batch at different times

SAME_STATE = "seed the ranks alike before building the model, or broadcast its state_dict"
SAME_DATA = (
    "seed your sampler by mosaic.get_context().dp_rank, "
    "so that ranks of one group see the same batch"
)


def checksum(x: torch.Tensor) -> torch.Tensor:
    """Two float64 numbers that depend on every element and its position."""
    flat = x.detach().reshape(-1).to(torch.float64)
    ramp = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device) % 8191 + 1
    return torch.stack([flat.sum(), (flat * ramp).sum()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()))
