"""Makes a failing program smaller while it fails in the same way: fewer outputs, steps, options."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.judge import Verdict
from fuzz.program import Program, Step, names_in

SECONDS = 60.0


def reduced(
    program: Program,
    verdict: Verdict,
    attempt: Callable[[Program], Verdict],
    seconds: float = SECONDS,
) -> tuple[Program, Verdict]:
    """The smallest program found in that time whose outcome is the same, with its verdict."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for candidate in smaller(program):
            if time.monotonic() > deadline:
                return program, verdict
            found = attempt(candidate)
            if found.outcome == verdict.outcome and alike(found.detail, verdict.detail):
                program, verdict, progress = candidate, found, True
                break
    return program, verdict


def alike(one: str, other: str) -> bool:
    """Crashes are alike by the type of the exception."""
    return one.partition(":")[0] == other.partition(":")[0] or "off by" in one + other


def smaller(program: Program) -> Iterator[Program]:
    """Programs with something left out; most are valid."""
    yield from (pruned(replace(program, returned=r)) for r in fewer_outputs(program.returned))
    for options in ({"calls": 1}, {"spec": "None"}, {"training": True}, {"grad": True}):
        if any(getattr(program, k) != v for k, v in options.items()) and program.ranks < 4:
            yield replace(program, **options)
    for i in reversed(range(len(program.steps))):
        yield from without_step(program, i)


def fewer_outputs(returned: str) -> list[str]:
    """Each part of a tuple, list or dict that is returned, alone."""
    try:
        tree = ast.parse(returned, mode="eval").body
    except SyntaxError:
        return []
    if isinstance(tree, ast.Dict):
        parts: list[ast.expr] = list(tree.values)
    elif isinstance(tree, (ast.Tuple, ast.List)):
        parts = list(tree.elts)
    elif isinstance(tree, ast.BinOp):
        parts = [tree.left, tree.right]
    else:
        return []
    texts = [ast.unparse(part) for part in parts]
    fewer = (
        [", ".join(texts[:i] + texts[i + 1 :]) for i in range(len(texts))] if len(texts) > 2 else []
    )
    return [t for t in texts if re.search("[a-z]", t)] + fewer


def without_step(program: Program, i: int) -> Iterator[Program]:
    """The step is dropped, or its value is that of something before it."""
    steps = program.steps[:i] + program.steps[i + 1 :]
    made = made_by(program.steps[i])
    rest = " ".join(s.text for s in program.steps[i + 1 :]) + program.returned
    if not made & names_in(rest):
        yield pruned(replace(program, steps=steps))
        return
    name = sorted(made & names_in(rest))[0]
    earlier = [*sorted(names_in(" ".join(program.steps[i].lines)) - made), "x"]
    candidates = [n for n in earlier if re.fullmatch(r"x|z|[vqkot]\d+", n)]
    for other in dict.fromkeys(candidates):
        yield renamed(program, i, name, other)
    lines = program.steps[i].lines
    for j in range(len(lines) - 1, -1, -1):
        step = replace(program.steps[i], lines=lines[:j] + lines[j + 1 :])
        yield pruned(replace(program, steps=(*program.steps[:i], step, *program.steps[i + 1 :])))


def renamed(program: Program, i: int, name: str, other: str) -> Program:
    """``name = other`` goes, and ``other`` is read instead."""

    def new(text: str) -> str:
        return re.sub(rf"\b{name}\b", other, text)

    later = tuple(replace(s, lines=tuple(map(new, s.lines))) for s in program.steps[i + 1 :])
    return pruned(
        replace(program, steps=(*program.steps[:i], *later), returned=new(program.returned))
    )


def made_by(step: Step) -> set[str]:
    found = re.findall(r"^\s*(\w+) = ", "\n".join(step.lines), re.M)
    return set(found)


def pruned(program: Program) -> Program:
    """Without the inputs and parameters that nobody reads."""
    read = names_in(" ".join(line for s in program.steps for line in s.lines) + program.returned)
    steps = tuple(
        replace(
            step,
            setup=tuple(
                line for line in step.setup if set(re.findall(r"\b[wbm]\d+\b", line)) & read
            ),
            inputs=tuple(line for line in step.inputs if line.partition(" ")[0] in read),
        )
        for step in program.steps
    )
    inputs = tuple(line for line in program.inputs if line.startswith("x ") or line[0] in read)
    return replace(program, steps=steps, inputs=inputs)
