"""Draws a whole program: inputs, an attention, what stands around it, what is returned, a spec."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fuzz import templates
from fuzz.attentions import attention_step
from fuzz.draw import Draw
from fuzz.holes import Filler, UnfillableError
from fuzz.program import Program, Step, names_in
from fuzz.scope import Scope, is_float

TRIES = 12
SHAPES = (
    ("b n e", "2, {n}, {e}"),
    ("b n e", "1, {n}, {e}"),
    ("b n e", "3, {n}, {e}"),
    ("n e", "{n}, {e}"),
    ("b h n e", "2, 3, {n}, {e}"),
    ("b n c e", "2, {n}, 3, {e}"),
    ("b n c e", "1, {n}, 5, {e}"),
    ("b e n", "2, {e}, {n}"),
)
METHODS = (
    "'ring'",
    "'all_gather'",
    "'ulysses'",
    "'auto'",
    "mosaic.Ring(stages=1)",
    "mosaic.Ring(stages=2)",
)


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are, and how programs are cut over them."""

    count: int
    init: str
    methods: tuple[str, ...] = METHODS
    two_axes: bool = False


MESHES = {
    "2": Ranks(2, "{'sp_size': 2}", (*METHODS, "mosaic.Mesh2D(2, 1)", "mosaic.Mesh2D(1, 2)")),
    "3": Ranks(3, "{'sp_size': 3}", (*METHODS, "mosaic.Ring(stages=3)", "mosaic.Mesh2D(1, 3)")),
    "2x2": Ranks(
        4,
        "{'mesh_shape': (2, 2), 'mesh_axes': ('r', 'c')}",
        (
            "mosaic.Ring(mesh='r,c')",
            "mosaic.Ring(mesh='r')",
            "mosaic.Mesh2D(2, 2, mesh='r,c')",
            "mosaic.Hierarchical(2, mesh='r,c')",
            "mosaic.Composed(mosaic.Ulysses(mesh='r'), mosaic.Ring(mesh='c'))",
            "mosaic.AllGather(mesh='c')",
        ),
        two_axes=True,
    ),
}


def generate(draw: Draw, mesh: str, steps: int = 8) -> Program:
    """A program that runs in eager mode on one process, as far as running it forward shows."""
    ranks = MESHES[mesh]
    names, sizes = draw.choice(SHAPES)
    n = draw.choice((7, 8, 4, 5, 11, 6, 2, 3, 1, 12, 16, 13, 23, 40))
    sizes = sizes.format(n=n, e=draw.choice((4, 8, 6, 12)))
    scope = Scope(draw, axis=n)
    grad = not draw.chance(12)
    x = f"x = torch.randn({sizes}{', requires_grad=True' if grad else ''})"
    scope.give("x", x.partition(" = ")[2])
    inputs = [x]
    if draw.chance(30):
        inputs.append(f"z = torch.randn({sizes})")
        scope.give("z", inputs[-1].partition(" = ")[2])
    random = draw.chance(8)
    spec = spec_of(draw, ranks, names)
    before = int(draw.chance(40 if spec == "None" else 10))
    for _ in range(before):
        add(scope, random)
    attend_first(scope, names)
    for _ in range(draw.integer(0, steps)):
        add(scope, random)
    returned = outputs(scope)
    return Program(
        tuple(inputs),
        tuple(scope.steps),
        returned,
        ranks=ranks.count,
        init=ranks.init,
        spec=spec,
        calls=2 if draw.chance(10) else 1,
        grad=not draw.chance(6),
        training=not draw.chance(15),
        dtype="torch.float32" if draw.chance(6) else "torch.float64",
        reference="one rank" if random else "eager",
    )


def add(scope: Scope, random: bool) -> None:
    """One more step, of what fits."""
    for _ in range(TRIES):
        try:
            made = drawn_step(scope, random)
        except UnfillableError:
            continue
        if made is not None and scope.take(*made):
            return


def attend_first(scope: Scope, names: str) -> None:
    latest = [n for n, v in scope.values.items() if is_float(v) and n != "z"]
    for _ in range(TRIES):
        subject = scope.draw.choice(latest[-2:][::-1])
        value = scope.values[subject]
        if value.ndim < 2:
            continue
        if names == "b e n" and subject == "x":
            step = Step(lines=(f"{scope.fresh('v')} = x.mT",))
            scope.take(step, f"v{scope.count}")
            subject = f"v{scope.count}"
        made = attention_step(scope, subject)
        if made is not None and scope.take(*made):
            scope.attended.add(made[1])
            return


def drawn_step(scope: Scope, random: bool) -> tuple[Step, str] | None:
    draw = scope.draw
    if draw.chance(10):
        return attention_step(scope)
    families = [text for weight, text in templates.FAMILIES.values() for _ in range(weight)]
    if random:
        families += [templates.RANDOM] * 30
    text = draw.choice(templates.lines_of(draw.choice(families)))
    if draw.chance(6) and ";;" not in text:
        return around(scope, text)
    filler = Filler(scope)
    name = scope.fresh("v")
    *statements, last = filler.fill(text).split(" ;; ")
    lines = [as_name(line, name) for line in statements] + [f"{name} = {as_name(last, name)}"]
    if lines[-1] == f"{name} = {name}":
        lines.pop()
    if draw.chance(5) and not any(line.startswith("for ") for line in lines):
        block = draw.choice(templates.BLOCKS)
        lines = [block + "\n" + "\n".join(f"    {line}" for line in lines)]
    return Step(tuple(filler.setup), tuple(filler.inputs), tuple(lines)), name


def as_name(text: str, name: str) -> str:
    """``_`` is the step's own name."""
    return re.sub(r"(?<!\w)_(?!\w)", name, text)


def around(scope: Scope, text: str) -> tuple[Step, str] | None:
    """An expression inside a checkpoint, a vmap, or behind a detach."""
    filler = Filler(scope)
    outer = scope.draw.choice(templates.lines_of(templates.AROUND))
    filler.called = "t"
    inner = filler.fill(text)
    if not filler.subject:
        return None
    text = outer.replace("{x}", filler.subject).replace("@", inner)
    filler.called = ""
    text = filler.fill(text) if "{" in text else text
    name = scope.fresh("v")
    return Step(tuple(filler.setup), tuple(filler.inputs), (f"{name} = {text}",)), name


def outputs(scope: Scope) -> str:
    """The text of what is returned: the last value, often others, often views of one."""
    draw = scope.draw
    names = list(scope.values)
    follows = [n for n in names if scope.is_attended(n)]
    last = follows[-1] if follows and draw.chance(90) else names[-1]
    names = [n for n in names if n != last] or names
    unread = [n for n in names if is_unread(scope, n)] or names
    others = draw.sample(unread if draw.chance(85) else names, draw.integer(0, 4))
    floats = [n for n in (*names, last) if is_float(scope.values[n])]
    if not any(is_float(scope.values[n]) for n in (last, *others)):
        others.append(floats[-1])
    alias = draw.choice(floats)
    forms: tuple[Callable[[], str], ...] = (
        lambda: ", ".join((last, *others)),
        lambda: ", ".join((last, *others)),
        lambda: f"{{'a': {last}, 'b': [{', '.join(others)}]}}",
        lambda: f"{last}, {alias}, {alias}.unsqueeze(0)",
        lambda: f"({last}, ({', '.join((*others, alias))},)), None, 3",
        lambda: f"{last}, {alias}[..., -1:], x",
        lambda: f"{last}.double().mean() + {alias}.square().mean()",
        lambda: f"{last}, {alias}.reshape(-1)[1:], {alias}.shape",
        lambda: f"{last}, {alias}.detach(), {last}",
    )
    return draw.choice(forms)()


def is_unread(scope: Scope, name: str) -> bool:
    word = re.match(r"\w+", name)[0]
    return sum(word in names_in(step.text) for step in scope.steps) < 2


def spec_of(draw: Draw, ranks: Ranks, names: str) -> str:
    if draw.chance(35) and not ranks.two_axes:
        return "None"
    gather = ", on_gather='error'" if draw.chance(4) else ""
    if ranks.two_axes and "c" in names and draw.chance(60):
        a, b = draw.choice((("ring", "ring"), ("ulysses", "ring"), ("all_gather", "auto")))
        a, b = (f"mosaic.{METHOD_CLASS[m]}(mesh='{axis}')" for m, axis in ((a, "r"), (b, "c")))
        return f"mosaic.ShardingSpec(inputs={{'x': '{names}'}}, axes={{'n': {a}, 'c': {b}}})"
    method = draw.choice(ranks.methods)
    return f"mosaic.ShardingSpec(inputs={{'x': '{names}'}}, axes={{'n': {method}}}{gather})"


METHOD_CLASS = {"ring": "Ring", "ulysses": "Ulysses", "all_gather": "AllGather", "auto": "Auto"}
