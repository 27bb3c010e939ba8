"""What the lowering of one attention has to know, written into the graph as a string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mosaic.errors import UnsupportedError
from mosaic.layout import Layout, Place, Shard


@dataclass(frozen=True)
class AttentionPlan:
    """How one rank does one attention.

    ``query`` and ``key`` are layouts over the global positions; query i sees key j <= i where
    ``causal``. ``batch`` and ``heads`` are encoded ``Shard``s where another mesh axis cuts that dim
    of q, and "" where it is whole: dropout needs global indices.
    """

    method: str
    rank: int
    group: str
    query: Layout
    key: Layout
    causal: bool
    scale: float
    dropout: float = 0.0
    site: int = 0
    batch: str = ""
    heads: str = ""

    def __post_init__(self) -> None:
        if self.method != "local" and not (self.query.is_partition and self.key.is_partition):
            raise UnsupportedError(
                f"{self.method!r} needs queries and keys that are each held once",
                query=self.query,
                key=self.key,
            )

    @property
    def p(self) -> int:
        return self.key.p

    def encode(self) -> str:
        """All of it, readable, the same on every run."""
        return json.dumps({**asdict(self), "query": str(self.query), "key": str(self.key)})

    @classmethod
    def decode(cls, text: str) -> AttentionPlan:
        fields = json.loads(text)
        fields.update({name: Layout.parse(fields[name]) for name in ("query", "key")})
        return cls(**fields)

    def shard_of(self, dim: str, size: int) -> Shard:
        """How the ``batch`` or ``heads`` dim of local length ``size`` is cut."""
        text = self.batch if dim == "batch" else self.heads
        return Shard.decode(text) if text else whole_shard(size)


def whole_shard(size: int) -> Shard:
    """A dim that nobody cuts."""
    return Shard(Place(Layout.whole(size, 1), 0), 0, "")
