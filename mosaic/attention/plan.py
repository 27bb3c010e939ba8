"""What the lowering of one attention has to know, written into the graph as a string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from mosaic.api.errors import UnsupportedError
from mosaic.attention.blocks import FULL, Band
from mosaic.attention.schedule import head_group, same_heads
from mosaic.attention.strategy import Strategy
from mosaic.attention.tiles import TileProgram, adds_bias
from mosaic.attention.transfer import Side
from mosaic.layout import Layout, Place, Shard, united


@dataclass(frozen=True)
class AttentionPlan:
    """How one rank does one attention.

    ``query`` and ``key`` are layouts over the global positions, for the ranks ``members`` of the
    group (all ``world`` of them where it is empty); ``rank`` is this one's number among them. Query
    i sees keys i - band.left ... i + band.right; ``seen`` are those that each rank's queries may
    see, where more is known of the mask. ``batch`` and ``heads`` are encoded ``Shard``s where that
    dim of q is cut, and "" where it is whole: dropout needs global indices. ``tile`` is the
    ``TileProgram`` of a dense mask, and ``scores`` one that changes scores, if it has one.
    """

    strategy: Strategy
    rank: int
    group: str
    query: Layout
    key: Layout
    band: Band = FULL
    scale: float = 1.0
    dropout: float = 0.0
    site: int = 0
    batch: str = ""
    heads: str = ""
    tile: str = ""
    scores: str = ""
    members: tuple[int, ...] = ()
    world: int = 0
    seen: Layout | None = None

    def __post_init__(self) -> None:
        moved = [self.key] if self.strategy.everywhere else [self.key, self.query]
        if self.strategy.ranks > 1 and not all(layout.is_partition for layout in moved):
            raise UnsupportedError(
                f"{self.strategy} needs queries and keys that are each held once",
                query=self.query,
                key=self.key,
                fix="cut them with Layout.even or Layout.zigzag, or use the method 'local'",
            )

    @property
    def p(self) -> int:
        return self.key.p

    @property
    def has_bias(self) -> bool:
        """Whether the program of its mask makes what is added to the scores."""
        return adds_bias(self.tile)

    @property
    def learned(self) -> tuple[int, ...]:
        """The leaves of its programs that get a gradient."""
        programs = [TileProgram.parse(text) for text in (self.tile, self.scores) if text]
        return tuple(sorted({i for program in programs for i in program.learned}))

    @property
    def side(self) -> Side:
        members = self.members or tuple(range(self.p))
        return Side(self.rank, members, self.world or self.p, self.group)

    def encode(self) -> str:
        """All of it, readable, the same on every run."""
        seen = "" if self.seen is None else str(self.seen)
        layouts = {"query": str(self.query), "key": str(self.key), "seen": seen}
        return json.dumps({**asdict(self), **layouts})

    @classmethod
    def decode(cls, text: str) -> AttentionPlan:
        fields = json.loads(text)
        layouts = {name: fields[name] for name in ("query", "key", "seen")}
        fields.update({name: Layout.parse(x) if x else None for name, x in layouts.items()})
        fields["strategy"], fields["band"] = (
            Strategy.decode(fields["strategy"]),
            Band(*fields["band"]),
        )
        return cls(**{**fields, "members": tuple(fields["members"])})

    def shard_of(self, dim: str, size: int) -> Shard:
        """How the ``batch`` or ``heads`` dim of local length ``size`` is cut."""
        text = self.batch if dim == "batch" else self.heads
        return Shard.decode(text) if text else whole_shard(size)

    # --- heads before sequence -------------------------------------------------------------

    @property
    def head_group(self) -> tuple[int, ...]:
        """The ranks with which this one exchanges sequence for heads."""
        return head_group(self.strategy, self.rank, self.p)

    def after_heads(self, heads: int) -> AttentionPlan:
        """What is left to do after the exchange: fewer heads (of ``heads``), longer shards."""
        members = same_heads(self.strategy, self.rank, self.p)
        groups = [head_group(self.strategy, member, self.p) for member in members]
        slot = self.head_group.index(self.rank)
        cut = Shard(Place(Layout.even(heads, self.strategy.heads), 0), slot, "")
        return replace(
            self,
            strategy=replace(self.strategy, heads=1),
            rank=members.index(self.rank),
            query=together(self.query, groups),
            key=together(self.key, groups),
            seen=None if self.seen is None else together(self.seen, groups),
            heads=cut.encode(),
            members=members,
            world=self.p,
        )


def together(layout: Layout, groups: list[tuple[int, ...]]) -> Layout:
    """The layout over groups of ranks: each holds what its ranks hold, in global order."""
    return Layout(
        layout.n, tuple(united(i for rank in group for i in layout.ranks[rank]) for group in groups)
    )


def whole_shard(size: int) -> Shard:
    """A dim that nobody cuts."""
    return Shard(Place(Layout.whole(size, 1), 0), 0, "")
