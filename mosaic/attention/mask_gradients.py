"""The gradient of a mask, added up visit by visit: of its rows, or of what makes its tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from mosaic.attention.merge import accumulator
from mosaic.attention.plan import AttentionPlan
from mosaic.attention.tiles import TileProgram
from mosaic.attention.visit import Inputs
from mosaic.layout import Interval, Intervals, placed


class MaskGradients(Protocol):
    """What becomes of a visit's part (batch|1, heads|1, seq|1, keys|1) for the keys at ``keys``."""

    def add(self, keys: Intervals, part: Tensor) -> None: ...

    def total(self) -> list[Tensor]: ...


def mask_gradients(plan: AttentionPlan, rows: Intervals, inputs: Inputs) -> MaskGradients:
    if inputs.mask is None:
        return OfLeaves(TileProgram.parse(plan.tile), rows, inputs)
    return OfRows(inputs.mask, plan.key.n)


@dataclass
class OfLeaves:
    """One for each leaf, of no element for those that get none."""

    program: TileProgram
    rows: Intervals
    inputs: Inputs
    found: dict[int, Tensor] = field(default_factory=dict)

    def add(self, keys: Intervals, part: Tensor) -> None:
        new = self.program.gradients(self.inputs.leaves, self.rows, keys, part)
        for i, grad in zip(self.program.learned, new, strict=True):
            grad = grad.to(accumulator(grad.dtype))
            self.found[i] = self.found[i] + grad if i in self.found else grad

    def total(self) -> list[Tensor]:
        return [self._gradient(i, leaf) for i, leaf in enumerate(self.inputs.leaves)]

    def _gradient(self, number: int, leaf: Tensor) -> Tensor:
        if number not in self.program.learned:
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
