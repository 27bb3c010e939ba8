"""Where in the user's code a node comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

FRAME = re.compile(
    r'  File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n\s+(?P<code>.+)'
)
ROOTS = (Path(__file__).parents[1], Path(torch.__file__).parent)
INSIDE = tuple({str(path) for root in ROOTS for path in (root, root.resolve())})
LIBRARY = ("site-packages", "dist-packages", "<frozen", "<eval_with_key>")


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line} in {self.function}\n  {self.code}"


def frames(node: fx.Node) -> tuple[Frame, ...]:
    """The frames of a node's stack trace outside torch and Mosaic, outermost first."""
    return frames_of(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def frames_of(stack_trace: str) -> tuple[Frame, ...]:
    found = (
        Frame(m["file"], int(m["line"]), m["function"], m["code"].strip())
        for m in FRAME.finditer(stack_trace)
    )
    return tuple(f for f in found if not f.file.startswith(INSIDE) and "<" not in f.file)


def innermost(node: fx.Node) -> Frame | None:
    """The user's line; when that lies in a library (transformers), still the innermost one."""
    found = frames(node) or next((f for n in node.all_input_nodes if (f := frames(n))), ())
    return found[-1] if found else None


def where(node: fx.Node) -> str:
    """``model.py:10 in forward`` and its code; a second line when that lies in a library."""
    inner = innermost(node)
    if inner is None:
        return "source line not recorded"
    own = [f for f in frames(node) if not any(mark in f.file for mark in LIBRARY)]
    if not own or own[-1] == inner:
        return str(inner)
    return f"{inner}\nreached from {shown(own[-1].file)}:{own[-1].line}"


def line(node: fx.Node) -> str:
    """``model.py:10``, for tables."""
    inner = innermost(node)
    return f"{shown(inner.file)}:{inner.line}" if inner else "source line not recorded"


def code(node: fx.Node) -> str:
    inner = innermost(node)
    return inner.code if inner else ""


def shown(file: str) -> str:
    """A path as short as it is clear: relative to here, or from the library's name on."""
    path = Path(file)
    for mark in LIBRARY[:2]:
        if mark in path.parts:
            return "/".join(path.parts[path.parts.index(mark) + 1 :])
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def nodes_of(module: fx.GraphModule) -> Iterator[fx.Node]:
    """All nodes of Dynamo's graph, with those of the bodies of checkpoints."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def user_of(node: fx.Node) -> fx.Node:
    """The first use of an input, which has a line."""
    return next((u for u in node.users if frames(u)), node)
