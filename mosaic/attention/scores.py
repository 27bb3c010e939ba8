"""What a program makes of scores, before mask, band and documents: softcap, a bias for each pair.

A score program is a ``TileProgram`` that is given all leaves and then the scaled score, and gives
what replaces it.

>>> import torch
>>> leaves = (torch.ones(1, 1, 1, 1),)
>>> scores = Structure("float32: add.Tensor(%1, %0); tanh(%2); mul.Tensor(%3, 50.0)", leaves)
>>> changed(scores, torch.tensor([[[[0.0]]]]))
tensor([[[[38.0797]]]])
>>> with_bias(scores, Structure("float32: neg(%0)", leaves)).program
'float32: add.Tensor(%1, %0); tanh(%2); mul.Tensor(%3, 50.0); neg(%0); add.Tensor(%4, %5)'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mosaic.attention.structure import Structure, renumbered
from mosaic.attention.tiles import Ref, Step, TileProgram


def changed(scores: Structure | None, score: Tensor) -> Tensor:
    """(batch, heads, rows, keys), as it came where there is nothing to change."""
    return score if scores is None else scores.parsed(*scores.leaves, score).to(score.dtype)


def gradients(scores: Structure | None, score: Tensor, dchanged: Tensor) -> tuple[Tensor, ...]:
    """Of the score, and of each learned leaf, of that of ``changed``."""
    if scores is None:
        return (dchanged,)
    program, count = scores.parsed, len(scores.leaves)
    of_all = replace(program, learned=(count, *program.learned))
    return tuple(of_all.gradients((*scores.leaves, score), dchanged).values())


def with_bias(scores: Structure | None, bias: Structure) -> Structure:
    """The change that also adds a bias of the same leaves."""
    count = len(bias.leaves)
    before = scores.parsed if scores else TileProgram((), bias.parsed.dtype)
    made = [renumbered(step, count, 0, 1 + len(before.steps)) for step in bias.parsed.steps]
    last = [Ref(count + len(before.steps)), Ref(count + len(before.steps) + len(made))]
    steps = (*before.steps, *made, Step("add.Tensor", tuple(last)))
    learned = sorted({*before.learned, *bias.parsed.learned})
    return Structure(str(TileProgram(steps, before.dtype, tuple(learned))), bias.leaves)


def then(scores: Structure, op: str, by: Tensor | float) -> Structure:
    """The change with one step more, by a number or by a vector, which is the last leaf then."""
    program, leaves, steps = scores.parsed, scores.leaves, scores.parsed.steps
    last: Ref | float = Ref(len(leaves)) if isinstance(by, Tensor) else by
    if isinstance(by, Tensor):
        steps = tuple(renumbered(step, len(leaves), 0, 1) for step in steps)
        leaves = (*leaves, by)
    step = Step(op, (Ref(len(leaves) + len(steps)), last))
    return Structure(str(replace(program, steps=(*steps, step))), leaves)


def bias_of(scores: Structure) -> tuple[Structure, Tensor | None] | None:
    """What a change adds to a score, and what it takes off for a row, if that is all it does: the
    inverse of ``with_bias``, and of ``then`` with a shift."""
    leaves, steps, shift = scores.leaves, scores.parsed.steps, None
    score = len(leaves)
    if steps[-1] == Step("sub.Tensor", (Ref(score + len(steps) - 1), Ref(score - 1))):
        leaves, steps, shift = leaves[:-1], steps[:-1], leaves[-1]
    *made, last = steps
    of_bias = Ref(score + len(made))
    if not made or last != Step("add.Tensor", (Ref(score), of_bias)) or reads(made, Ref(score)):
        return None
    program = tuple(renumbered(step, score, 0, len(leaves) - score - 1) for step in made)
    return Structure(str(replace(scores.parsed, steps=program)), leaves), shift


def reads(steps: Sequence[Step], number: Ref) -> bool:
    """Whether any step is given this result."""
    return any(number in (*step.args, *dict(step.kwargs).values()) for step in steps)


def behind_leaves(scores: str, count: int) -> str:
    """A score program without leaves, where a mask's program has so many."""
    program = TileProgram.parse(scores)
    steps = tuple(renumbered(step, 0, 0, count) for step in program.steps)
    return str(replace(program, steps=steps))


def unlearned(scores: Structure | None) -> Structure | None:
    """The same, of which no leaf gets a gradient."""
    if scores is None:
        return None
    return scores._replace(program=str(replace(scores.parsed, learned=())))
