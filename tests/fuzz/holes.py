"""Fills the holes of a template: ``F.pad({x}, ({k}, {s}))`` -> ``F.pad(v3, (1, -2))``.

x x1..x5  a float tensor, the subject (of that many dims); xi xb xc of int, bool, complex
y b m     another of its shape, one that broadcasts against it, a mask that does
d d2 dims a dim, another one, some of them;  perm unf split view  arguments of such ops
n i list  the length of d, an index into it, a list of indices;  at ix  a subscript
k k1 s c  numbers: 0..3, 1..3, -3..3, a scalar;  keep flag  booleans
w:SIZES ids:SIZES;HIGH mod:CODE  a parameter, integers, a module; sizes in B, C, E, N (of d), n
a|b|c     one of these
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fuzz.scope import Scope, is_float
from torch import Tensor

HOLE = re.compile(r"\{([^{}]*)\}")
SUBJECT = re.compile(r"\{x([1-5ibc]?)\}")
REDUCING = ("mean", "sum", "amax", "std", "norm")
SCALARS = ("2.0", "0.5", "-1.5", "0.3", "3")


class UnfillableError(Exception):
    """Nothing in scope fits a hole."""


@dataclass
class Filler:
    """One template's holes: those of one kind have one value (``{d}`` is the same dim twice)."""

    scope: Scope
    called: str = ""  # what the subject is called here, if not by its name
    subject: str = ""
    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    shape: tuple[int, ...] = ()
    setup: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def fill(self, template: str) -> str:
        found = SUBJECT.search(template)
        if found and not self.subject:
            self.choose_subject(found[1])
        return HOLE.sub(lambda hole: self.filled(hole[1]), template)

    def choose_subject(self, kind: str) -> None:
        allowed: dict[str, Callable[[Tensor], bool]] = {
            "": is_float,
            "i": lambda t: t.dtype == torch.int64,
            "b": lambda t: t.dtype == torch.bool,
            "c": lambda t: t.is_complex(),
        }
        fits = allowed.get(kind) or (lambda t: is_float(t) and t.ndim == int(kind))
        subject = self.scope.pick(fits)
        if subject is None:
            raise UnfillableError
        self.subject, self.value = subject, self.scope.values[subject]
        self.shape = self.value.shape

    def filled(self, hole: str) -> str:
        if "|" in hole:
            return self.draw.choice(hole.split("|"))
        if SUBJECT.fullmatch("{" + hole + "}"):
            return self.called or self.subject
        kind, _, argument = hole.partition(":")
        if not hasattr(self, f"hole_{kind}"):
            return hole
        if argument:
            return getattr(self, f"hole_{kind}")(argument)
        if kind in ("k", "k1", "s", "c", "i", "keep", "flag", "y", "b"):
            return getattr(self, f"hole_{kind}")()
        if kind not in self.known:
            self.known[kind] = getattr(self, f"hole_{kind}")()
        return self.known[kind]

    @property
    def draw(self):
        return self.scope.draw

    def dim(self) -> int:
        return int(self.filled("d")) % max(self.value.ndim, 1)

    @property
    def length(self) -> int:
        return self.shape[self.dim()] if self.value.ndim else 1

    # --- numbers -------------------------------------------------------------------------------

    def hole_k(self) -> str:
        return str(self.draw.integer(0, 3))

    def hole_k1(self) -> str:
        return str(self.draw.integer(1, 3))

    def hole_s(self) -> str:
        return str(self.draw.choice((0, 1, -1, 2, -2, 3, -3)))

    def hole_c(self) -> str:
        return self.draw.choice(SCALARS)

    def hole_keep(self) -> str:
        return str(self.draw.chance(50))

    hole_flag = hole_keep

    def hole_n(self) -> str:
        return str(self.length)

    def hole_i(self) -> str:
        return str(self.draw.integer(0, 2 * self.length - 1) - self.length)

    def hole_list(self) -> str:
        count = self.draw.integer(1, 5)
        return str([self.draw.integer(-self.length, self.length - 1) for _ in range(count)])

    # --- dims ----------------------------------------------------------------------------------

    def hole_d(self) -> str:
        """The axis that is cut is likelier."""
        ndim = self.value.ndim
        dims = [d for d in range(ndim) if self.shape[d] == self.scope.axis]
        if dims and self.draw.chance(65):
            d = self.draw.choice(dims)
        else:
            d = self.draw.integer(0, max(ndim - 1, 0))
        return str(d - ndim if ndim and self.draw.chance(40) else d)

    def hole_d2(self) -> str:
        others = [d for d in range(self.value.ndim) if d != self.dim()]
        if not others:
            raise UnfillableError
        return str(self.draw.choice(others))

    def hole_dims(self) -> str:
        ndim = self.value.ndim
        count = self.draw.integer(1, max(1, min(3, ndim)))
        rest = [d for d in range(ndim) if d != self.dim()]
        dims = [self.dim(), *self.draw.sample(rest, count - 1)]
        return f"({', '.join(map(str, dims))},)"

    def hole_perm(self) -> str:
        return ", ".join(map(str, self.draw.sample(range(self.value.ndim), self.value.ndim)))

    def hole_unf(self) -> str:
        n = self.length
        factors = [f for f in range(1, n + 1) if n % f == 0]
        f = self.draw.choice(factors)
        return self.draw.choice((f"({f}, {n // f})", f"({f}, -1)", f"(-1, {n // f})"))

    def hole_split(self) -> str:
        n, sizes = self.length, []
        while n:
            sizes.append(self.draw.integer(1, n))
            n -= sizes[-1]
            if len(sizes) == 3 and n:
                sizes.append(n)
                break
        return str(sizes)

    def hole_view(self) -> str:
        """Neighbours merge, and a dim may split."""
        sizes: list[int] = []
        for n in self.shape:
            if sizes and self.draw.chance(35):
                sizes[-1] *= n
            elif n > 3 and self.draw.chance(25):
                f = self.draw.choice([f for f in range(1, n + 1) if n % f == 0])
                sizes += [f, n // f]
            else:
                sizes.append(n)
        texts = [str(n) for n in sizes]
        if texts and self.draw.chance(40):
            texts[self.draw.integer(0, len(texts) - 1)] = "-1"
        return ", ".join(texts) or "1"

    # --- subscripts ----------------------------------------------------------------------------

    def hole_slice(self) -> str:
        n = self.length

        def bound() -> str:
            return str(self.draw.integer(-n - 1, n + 1)) if self.draw.chance(60) else ""

        step = f":{self.draw.integer(1, 3)}" if self.draw.chance(40) else ""
        return f"{bound()}:{bound()}{step}"

    def hole_at(self) -> str:
        """A subscript along d alone, such as ``:, 1:-2``."""
        part = self.draw.choice(("slice", "slice", "slice", "i", "list"))
        d, ndim = self.dim(), self.value.ndim
        if not ndim:
            raise UnfillableError
        inside = getattr(self, f"hole_{part}")()
        if self.draw.chance(30):
            return ", ".join(["...", inside] + [":"] * (ndim - 1 - d))
        return ", ".join([":"] * d + [inside])

    def hole_ix(self) -> str:
        """Any subscript."""
        parts: list[str] = []
        for d in range(self.draw.integer(1, max(self.value.ndim, 1))):
            self.known["d"] = str(d)
            kind = self.draw.choice(("all", "slice", "i", "list", "new", "tensor"))
            parts += {
                "all": [":"],
                "slice": [self.hole_slice()],
                "i": [self.hole_i()],
                "list": [self.hole_list()],
                "new": ["None", ":"],
                "tensor": [f"torch.tensor({self.hole_list()})"],
            }[kind]
        return ", ".join(parts)

    # --- other tensors -------------------------------------------------------------------------

    def hole_y(self) -> str:
        name = self.scope.shaped(self.shape, unlike=self.subject)
        me = self.called or self.subject
        return name or f"{me}.{self.draw.choice(('cos()', 'flip(-1)', 'neg()', 'detach()'))}"

    def hole_b(self) -> str:
        """A value that broadcasts against the subject."""
        me, d, n = self.called or self.subject, self.filled("d"), self.length
        tail = (1,) * (self.value.ndim - 1 - self.dim())
        along = f".view({', '.join(map(str, (n, *tail)))})"
        fitting = self.scope.pick(lambda t: is_float(t) and broadcasts(t.shape, self.shape))
        options = [
            f"{me}.{self.draw.choice(REDUCING)}(dim={d}, keepdim=True)",
            self.draw.choice(SCALARS),
            f"torch.{self.draw.choice(('arange', 'ones'))}({n}){along}",
            f"torch.linspace(-1, 1, {n}){along}",
            self.hole_w(f"{n}") + along,
            self.hole_y(),
            fitting or "2",
        ]
        return self.draw.choice(options)

    def hole_m(self) -> str:
        me, d, n = self.called or self.subject, self.filled("d"), self.length
        tail = (1,) * (self.value.ndim - 1 - self.dim())
        along = f".view({', '.join(map(str, (n, *tail)))})"
        fitting = self.scope.pick(
            lambda t: t.dtype == torch.bool and broadcasts(t.shape, self.shape)
        )
        options = [
            f"({me} > 0)",
            f"(torch.arange({n}) < {self.draw.integer(0, n)}){along}",
            f"(torch.arange({n}) % 2 == 0){along}",
            f"({me}.mean({d}, keepdim=True) > 0)",
            f"({self.hole_ids(f'{n};2')} > 0){along}",
            fitting or f"({me} < 0.5)",
        ]
        return self.draw.choice(options)

    def symbols(self, text: str) -> str:
        shape = self.shape
        known = {"B": shape[0] if shape else 1, "E": shape[-1] if shape else 1, "n": self.length}
        known |= {"C": shape[1] if len(shape) > 1 else 1, "N": self.length}
        known |= {"S": ", ".join(map(str, shape)) or "1"}
        return re.sub(r"\b[BENCSn]\b", lambda m: str(known[m[0]]), text)

    def hole_w(self, sizes: str) -> str:
        name = self.scope.fresh("w")
        self.setup.append(f"self.{name} = nn.Parameter(torch.randn({self.symbols(sizes)}) * 0.4)")
        return f"self.{name}"

    def hole_buffer(self, sizes: str) -> str:
        name = self.scope.fresh("b")
        self.setup.append(f"self.register_buffer('{name}', torch.randn({self.symbols(sizes)}))")
        return f"self.{name}"

    def hole_ids(self, text: str) -> str:
        """Integers below HIGH: an input, a buffer, or a constant."""
        sizes, _, high = self.symbols(text).partition(";")
        count = math.prod(int(n) for n in sizes.split(",") if n.strip())
        if not 0 < count < 5_000:
            raise UnfillableError
        made = f"torch.randint(0, {high or 2}, ({sizes},))"
        if self.draw.chance(60):
            name = self.scope.fresh("ids")
            self.inputs.append(f"{name} = {made}")
            return name
        name = self.scope.fresh("b")
        self.setup.append(f"self.register_buffer('{name}', {made})")
        return f"self.{name}"

    def hole_mod(self, code: str) -> str:
        name = self.scope.fresh("m")
        self.setup.append(f"self.{name} = {self.symbols(code)}")
        return f"self.{name}"


def broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(a in (1, b) for a, b in pairs)
