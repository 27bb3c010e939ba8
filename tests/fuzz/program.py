"""A random program is data: steps of source text, from which a readable torch program is written.

>>> step = Step(setup=("self.w0 = nn.Parameter(torch.randn(4))",), lines=("v0 = x * self.w0",))
>>> print(Program(("x = torch.randn(2, 4)",), (step,), "v0").source)  # doctest: +ELLIPSIS
import torch
...
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0 = nn.Parameter(torch.randn(4))
<BLANKLINE>
    def forward(self, x):
        v0 = x * self.w0
        return v0
...
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
import mosaic
"""

MODEL = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
{setup}

    def forward(self, {arguments}):
{body}
        return {returned}


def make():
    model = Model(){mode}
    {inputs}
    return model, ({arguments},)


INIT = {init}
SPEC = {spec}
CALLS = {calls}
GRAD = {grad}
DTYPE = {dtype}
REFERENCE = {reference!r}
"""


@dataclass(frozen=True)
class Step:
    """What one step adds: lines of ``__init__``, inputs of the model, and lines of ``forward``."""

    setup: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join((*self.setup, *self.inputs, *self.lines))


@dataclass(frozen=True)
class Program:
    """A model, its inputs and how it is called; ``ranks`` is p, the rest is source text."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    returned: str
    ranks: int = 2
    init: str = "{'sp_size': 2}"
    spec: str = "None"
    calls: int = 1
    grad: bool = True
    training: bool = True
    dtype: str = "torch.float64"
    reference: str = "eager"  # or "one rank": a program that draws random numbers

    @property
    def source(self) -> str:
        inputs = [*self.inputs, *(i for s in self.steps for i in s.inputs)]
        setup = [line for s in self.steps for line in s.setup]
        body = [line for s in self.steps for line in s.lines]
        return f"{HEAD}\n\n" + MODEL.format(
            setup=indented(setup, 8),
            arguments=", ".join(i.partition(" ")[0] for i in inputs),
            body=indented(body, 8),
            returned=self.returned,
            mode="" if self.training else ".eval()",
            inputs="\n    ".join(inputs),
            init=self.init,
            spec=self.spec,
            calls=self.calls,
            grad=self.grad,
            dtype=self.dtype,
            reference=self.reference,
        )


def indented(lines: list[str], by: int) -> str:
    return "\n".join(" " * by + part for line in lines for part in line.splitlines())


def names_in(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


MAKERS = set("arange empty eye full linspace ones rand randn tensor tril_indices zeros".split())


def on_device(source: str, device: str) -> str:
    """The program with the device said wherever it makes a tensor, as its user would have to."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS:
                node.keywords.append(ast.keyword("device", ast.Constant(device)))
    return ast.unparse(tree)


def loaded(source: str, space: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a program's text as a module, where Dynamo finds it by its name, with the names in
    ``space``; tracebacks find its lines."""
    path = "program.py"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = sys.modules["program"] = ModuleType("program")
    module.__dict__.update(space or {})
    exec(compile(source, path, "exec"), module.__dict__)
    return module.__dict__
