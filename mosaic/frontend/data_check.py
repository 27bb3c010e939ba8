"""Ranks that share a sequence run the same graph, on the same data: looked at before every run.

The commonest mistake is a sampler that gives every rank other data. One all-gather of half a
kilobyte says which graph a rank runs, with which sizes, and a fingerprint of every whole argument;
before a graph's first run another one compares parameters and buffers.

On a GPU it goes ahead of the run, and is looked at when the run has been handed to the device and
before anybody has a result: no wrong number comes out, and the device, which then begins with the
run, is never without work. It is waited for before a graph's first run, and where this graph is not
the one that followed last time: of ranks that take different ways one at least stops before its
collectives meet others.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic.api.errors import MosaicError, ShardingError
from mosaic.graph.inputs import Input
from mosaic.runtime.fingerprint import fingerprint
from mosaic.runtime.mesh import MosaicContext, current_context
from mosaic.runtime.rendezvous import SAME, note_run
from mosaic.runtime.watch import watch

log = logging.getLogger(__name__)

#: A message: the graph's number, the sizes of arguments as far as there is room, fingerprints. It
#: is as long for every graph: ranks that run different ones must be able to exchange it.
SIZES, PRINTS = 31, 32

SAME_STATE = "seed the ranks alike before building the model, or broadcast its state_dict"
SAME_DATA = (
    "seed your sampler by mosaic.get_context().dp_rank, "
    "so that ranks of one group see the same batch"
)


@dataclass
class Ledger:
    """Of one group: which graph ran last, which followed each when it ran before, and the
    comparison of the run that goes on."""

    last: int | None = None
    follows: dict[int | None, int] = field(default_factory=dict)
    pending: Comparison | None = None

    def is_expected(self, graph: int) -> bool:
        """Whether it is the one that came here last time; notes that it has come."""
        is_expected = self.follows.get(self.last) == graph
        self.follows[self.last] = self.last = graph
        return is_expected

    def settle(self) -> None:
        """Raise what the comparison found."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.raise_if_different()


@dataclass
class DataCheck:
    """Of one compiled graph: call it with the graph's arguments before every run, and ``settle``
    when the run is on its way."""

    context: MosaicContext
    group: dist.ProcessGroup
    facts: str  # what ranks that run the same graph have in common
    arguments: Sequence[Input]
    state: Sequence[Input]
    every_run: bool
    runs: int = 0
    _head: Tensor | None = field(default=None, repr=False)
    _shapes: Sequence[torch.Size] = field(default=(), repr=False)

    def __call__(self, args: Sequence[Any]) -> None:
        """Raise ShardingError where the ranks differ, as far as that is known before the run."""
        if self.context.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        ledger = self.ledger
        ledger.settle()  # of a run that ended in an error
        self.runs += 1
        if self.runs > 1 and not self.every_run:
            return
        note_run(self.group)
        watch(self.group, self.context.device)
        ledger.pending = self._compared(args)
        is_first = self.runs == 1
        if not ledger.is_expected(self.number) or is_first or ledger.pending.event is None:
            ledger.settle()
        if is_first:
            self._check_state(args)

    def settle(self) -> None:
        """Raise ShardingError where the ranks differ, before the run's results are given."""
        self.ledger.settle()

    @property
    def ledger(self) -> Ledger:
        ledger: Ledger = self.context.ledgers.setdefault(self.group, Ledger())
        return ledger

    @property
    def number(self) -> int:
        digest = hashlib.sha256(self.facts.encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def _compared(self, args: Sequence[Any]) -> Comparison:
        device, found = self.context.device, [args[i.index] for i in self.arguments]
        tensors = [x for x in found if is_plain(x)]
        names = [i.name for i, x in zip(self.arguments, found, strict=True) if is_plain(x)]
        shapes = [x.shape for x in tensors]
        if self._head is None or shapes != self._shapes:  # of a bucket's program they change
            head = [self.number, *written(shapes)]
            self._head = torch.tensor(head, dtype=torch.int64).to(device)
            self._shapes = shapes
        prints = torch.zeros(PRINTS, dtype=torch.int64, device=device)
        for number, x in enumerate(tensors):
            prints[slot(number)] += fingerprint(x).to(device)
        everyone = gathered(torch.cat([self._head, prints]), self.group)
        return Comparison.of(everyone, self.group, names, self.runs)

    def _check_state(self, args: Sequence[Any]) -> None:
        """Parameters and buffers: one number each, in one all-gather."""
        pairs = [(i, args[i.index]) for i in self.state if is_plain(args[i.index])]
        if not pairs:
            return
        prints = torch.stack([fingerprint(x).to(self.context.device) for _, x in pairs])
        everyone = gathered(prints, self.group).cpu()
        differs = everyone != everyone[dist.get_rank(self.group)]
        if bool(differs.any()):
            number = int(differs.any(0).nonzero()[0])
            name = f"parameter or buffer {pairs[number][0].name}"
            raise different_data(name, differs[:, number], self.group, SAME_STATE)


@dataclass(frozen=True)
class Comparison:
    """What all ranks said before one run; on the host once the event is over."""

    said: Tensor  # (ranks, length)
    event: torch.cuda.Event | None
    group: dist.ProcessGroup
    names: Sequence[str]
    run: int

    @classmethod
    def of(
        cls, everyone: Tensor, group: dist.ProcessGroup, names: Sequence[str], run: int
    ) -> Comparison:
        if everyone.device.type != "cuda":
            return cls(everyone.cpu(), None, group, names, run)
        said = torch.empty_like(everyone, device="cpu", pin_memory=True)
        said.copy_(everyone, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(said, event, group, names, run)

    def raise_if_different(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        rank = dist.get_rank(self.group)
        differs = self.said != self.said[rank]
        if not bool(differs.any()):
            return
        graphs = differs[:, : 1 + SIZES].any(1)  # or sizes, in the program of a bucket
        if bool(graphs.any()):
            raise self._different_graphs(rank, graphs)
        prints = differs[:, 1 + SIZES :]
        if bool(prints.any()):
            number = int(prints.any(0).nonzero()[0])
            names = [name for i, name in enumerate(self.names) if slot(i) == number]
            name = f"argument {' or '.join(names)}"
            raise different_data(name, prints[:, number], self.group, SAME_DATA, self.run)

    def _different_graphs(self, rank: int, differs: Tensor) -> MosaicError:
        other = int(differs.nonzero()[0])
        sides = {r: read(self.said[r, 1 : 1 + SIZES].tolist()) for r in sorted({rank, other})}
        are_alike = len(sides[rank]) == len(sides[other]) == len(self.names)
        facts = {
            f"rank {r}": ", ".join(
                f"{self.names[i]} {shape}" if are_alike else str(shape)
                for i, shape in enumerate(shapes)
            )
            or "no tensor arguments"
            for r, shapes in sides.items()
        }
        return ShardingError(
            "ranks of one sequence-parallel group run different graphs: "
            "their arguments have other sizes, their modes differ, or their code took another way",
            **facts,
            fix=f"{SAME}; {SAME_DATA}",
        )


def different_data(
    name: str, differs: Tensor, group: dist.ProcessGroup, fix: str, run: int = 1
) -> ShardingError:
    ranks = differs.nonzero().flatten().tolist()
    return ShardingError(
        f"ranks of one sequence-parallel group were given different data: {name}",
        ranks=f"{ranks} differ from rank {dist.get_rank(group)}",
        **({"run": f"{run} of this graph"} if run > 1 else {}),
        fix=fix,
    )


def gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, length): what every rank says."""
    everyone = mine.new_empty([dist.get_world_size(group), *mine.shape])
    dist.all_gather(list(everyone.unbind()), mine, group)
    return everyone


def is_plain(x: Any) -> bool:
    """What has bits of its own in strides; other kinds of tensors are not looked at."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided


def slot(number: int) -> int:
    """Where an argument's fingerprint stands; what is left over shares the last place."""
    return min(number, PRINTS - 1)


def written(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Sizes as numbers: the count of dims, then each, for every argument; filled up with -1."""
    numbers = [n for shape in shapes for n in (len(shape), *map(int, shape))]
    return (numbers + [-1] * SIZES)[:SIZES]


def read(numbers: Sequence[int]) -> list[list[int]]:
    """The shapes that ``written`` had room for.

    >>> read(written([(2, 13), ()]))
    [[2, 13], []]
    """
    shapes, at = [], 0
    while at < len(numbers) and numbers[at] >= 0 and at + numbers[at] < len(numbers):
        shapes.append(list(numbers[at + 1 : at + 1 + numbers[at]]))
        at += 1 + numbers[at]
    return shapes


@atexit.register
def _look_at_the_last() -> None:
    """Of a run that ended in an error: no run comes after it that would."""
    context = current_context()
    for ledger in context.ledgers.values() if context else ():
        if ledger.pending is None or not ledger.pending.event.query():
            continue
        try:
            ledger.settle()
        except MosaicError as error:
            log.error("%s", error)
