"""What a user should hear once: slow, but right."""

from __future__ import annotations

import logging
import traceback

from torch import fx

from mosaic.attention.cost import size
from mosaic.graph.source import Frame, frames, frames_of, shown
from mosaic.masks.softmax import UNKNOWN
from mosaic.recurrences.loops import LOOP, NOTHING
from mosaic.report.plan import Plan
from mosaic.torch_private import RESUMED, compiles_left

log = logging.getLogger(__name__)
LARGE = 1 << 30  # bytes of an output made whole that are worth a word
_said: set[str] = set()


def once(text: str) -> None:
    """Warn, but only the first time."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


def gathered_at(why: str) -> None:
    """What an op of eager code makes whole, once for each of the user's lines."""
    frame = user_frame()
    line = f"{frame.file}:{frame.line}" if frame else "source line not recorded"
    once(f"gathered, correct but slow: {why} [{line}]")


def user_frame() -> Frame | None:
    """The user's line that is run."""
    frames = frames_of("".join(traceback.format_stack()))
    return frames[-1] if frames else None


def resumed_at(graph: fx.Graph) -> str | None:
    """Where the graph break before this graph is, if there is one."""
    for node in graph.nodes:
        for frame in frames(node):
            if frame.function.startswith(RESUMED):
                return f"{shown(frame.file)}, before line {frame.line}"
    return None


def announce(plan: Plan, is_part: bool) -> None:
    """``is_part``: the program is more than this graph."""
    if plan.ranks > 1 and NOTHING in plan.notes and not is_part:
        once("no attention in a whole program, and no recurrence that is known: it is not cut")
    for note in plan.notes:
        if note.startswith((UNKNOWN, LOOP)) and plan.ranks > 1:
            once(note)
    for line in plan.gathered:
        once(f"gathered, correct but slow: {line}")
    for c in plan.collectives:
        if c.why == "an output is whole" and c.bytes > LARGE:
            once(f"an output is gathered, {size(c.bytes)} from each rank [{c.source}]; "
                 'outputs="shards" leaves it cut')  # fmt: skip
    left = compiles_left()
    if left is not None and left <= 1 and plan.ranks > 1:
        once(
            f"{left} more version{'s' * (left != 1)} of this function will be compiled; "
            "then Dynamo runs it eagerly, unsharded. "
            "Pad to a few lengths, or raise torch._dynamo.config.recompile_limit"
        )
