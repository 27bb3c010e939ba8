"""The gradients of a mask, of what makes its tiles and of what changes scores, added up visit by
visit."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.tiles import of_part
from mosaic.attention.visit import Inputs
from mosaic.layout import Interval, Intervals, placed


@dataclass(frozen=True)
class MaskGradients:
    """First that of a mask that is added to the scores, if there is one, then one for each leaf."""

    rows: OfRows | None
    leaves: OfLeaves

    def add(self, keys: Intervals, dmask: Tensor | None, dleaves: dict[int, Tensor]) -> None:
        """A visit's of the mask's columns (batch|1, heads|1, seq|1, keys|1) at ``keys``, and of the
        leaves there."""
        if self.rows is not None and dmask is not None:
            self.rows.add(keys, dmask)
        self.leaves.add(keys, dleaves)

    def total(self) -> list[Tensor]:
        return [*(self.rows.total() if self.rows else ()), *self.leaves.total()]


def mask_gradients(plan: AttentionPlan, rows: Intervals, inputs: Inputs) -> MaskGradients:
    mask = inputs.mask
    is_added = mask is not None and mask.is_floating_point()
    of_rows = OfRows(mask, plan.key.n) if mask is not None and is_added else None
    return MaskGradients(of_rows, OfLeaves(plan.learned, rows, inputs))


@dataclass
class OfLeaves:
    """One for each leaf, of no element for those that get none."""

    learned: tuple[int, ...]
    rows: Intervals
    inputs: Inputs
    found: dict[int, Tensor] = field(default_factory=dict)

    def add(self, keys: Intervals, parts: dict[int, Tensor]) -> None:
        for i, part in parts.items():
            grad = of_part(part, self.inputs.leaves[i], self.rows, keys)
            self.found[i] = self.found[i] + grad if i in self.found else grad

    def total(self) -> list[Tensor]:
        return [self._gradient(i, leaf) for i, leaf in enumerate(self.inputs.leaves)]

    def _gradient(self, number: int, leaf: Tensor) -> Tensor:
        if number not in self.learned:
            return leaf.new_empty([0])
        found = self.found.get(number)
        return torch.zeros_like(leaf) if found is None else found.to(leaf.dtype)


@dataclass
class OfRows:
    """The columns side by side in global order; their sum where one column serves all keys."""

    mask: Tensor
    keys: int
    found: list[tuple[Intervals, Tensor]] = field(default_factory=list)

    def add(self, keys: Intervals, part: Tensor) -> None:
        self.found.append((keys, part))

    def total(self) -> list[Tensor]:
        mask = self.mask
        blank = mask.new_zeros([*mask.shape[:3], 1], dtype=accumulator(mask.dtype))
        if mask.shape[3] == 1:
            parts = [blank, *(part for _, part in self.found)]
            return [torch.stack(parts).sum(0).to(mask.dtype)]
        pieces, done = [], 0
        for (start, stop), part in sorted(self._columns(), key=itemgetter(0)):
            pieces += [blank.expand(-1, -1, -1, start - done), part]
            done = stop
        pieces.append(blank.expand(-1, -1, -1, self.keys - done))
        return [torch.cat(pieces, 3).to(mask.dtype)]

    def _columns(self) -> list[tuple[Interval, Tensor]]:
        return [
            (interval, part.narrow(3, run.start, interval.length))
            for keys, part in self.found
            for interval, run in placed(keys)
        ]
