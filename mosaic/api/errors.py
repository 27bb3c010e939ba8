"""The errors that Mosaic raises: a plain sentence, the user's line, the facts, the way out."""

from __future__ import annotations


class MosaicError(RuntimeError):
    """Anything that Mosaic refuses to do, or finds wrong.

    >>> print(ShardingError("cannot cut 'rows'", sizes="rows = 3", fix="use more rows"))
    cannot cut 'rows'
      sizes  rows = 3
      fix    use more rows
    """

    def __init__(
        self, title: str, *, where: str | None = None, fix: str | None = None, **facts: object
    ):
        self.title, self.where = title, where
        self.facts = {**facts, "fix": fix}
        lines = [title]
        if where:
            lines += [f"  {line}" for line in where.splitlines()]
        shown = {**facts, **({"fix": fix} if fix else {})}
        width = max((len(word) for word in shown), default=0)
        lines += [f"  {word:<{width}}  {fact}" for word, fact in shown.items()]
        super().__init__("\n".join(lines))

    def at(self, where: str | None) -> MosaicError:
        """The same, said with the user's line."""
        return type(self)(self.title, where=where, **self.facts)  # type: ignore[arg-type]


class ShardingError(MosaicError):
    """What the user asked for does not fit: names, sizes, meshes, ranks that disagree."""


class UnsupportedError(MosaicError):
    """Something that Mosaic cannot do exactly, and so does not do."""


for _error in (MosaicError, ShardingError, UnsupportedError):
    _error.__module__ = "mosaic"
