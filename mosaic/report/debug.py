"""``MOSAIC_DEBUG=folder``: what every compilation did, as files.

    folder/rank0/compile1/00 global.txt                 the graph as it was given
                          03 global analyze_masks.txt   the graph after a pass
                          03 global analyze_masks.diff  what the pass changed, if anything
                          17 backward overlap.txt       the last pass: the lowered graph
                          plan.txt

The files are written as the passes run: where a compilation fails, the last one is what the failing
pass was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch.distributed as dist
from torch import fx

from mosaic.graph import pipeline
from mosaic.partition.context import Context
from mosaic.report.plan import plans
from mosaic.report.show import diff, listing

FOLDER = "MOSAIC_DEBUG"
_compilations = count(1)


@contextmanager
def debugging() -> Iterator[None]:
    """Write the compilation that is made meanwhile, if ``MOSAIC_DEBUG`` names a folder for it."""
    if not os.environ.get(FOLDER):
        yield
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    folder = Path(os.environ[FOLDER]) / f"rank{rank}" / f"compile{next(_compilations)}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder)
    pipeline.OBSERVERS.append(steps.write)
    try:
        with plans() as found:
            yield
    finally:
        pipeline.OBSERVERS.remove(steps.write)
    (folder / "plan.txt").write_text("".join(f"{plan}\n" for plan in found))


class Steps:
    """Writes graphs into a folder, numbered in the order of the passes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = count()
        self.last = ""

    def write(self, after: str, kind: str, graph: fx.Graph, context: Context) -> None:
        text = listing(graph, context)
        name = f"{next(self.number):02} {kind} {after}".strip()
        (self.folder / f"{name}.txt").write_text(f"{text}\n")
        if after and text != self.last:
            (self.folder / f"{name}.diff").write_text(f"{diff(self.last, text)}\n")
        self.last = text
