"""A tensor that is not made until somebody reads it: a mask of n x n, as what it is made of.

    k, q = torch.arange(n), torch.arange(n)[:, None]
    (k <= q) & (ids[q] == ids[k])       # steps: arange, arange, unsqueeze, le, index, ...
                                        # leaves: ids (n,)

Its program grows by ops that look at one element of each operand. Any other op has it made first;
a compiled program takes its steps and leaves in its place, and reads what they mean.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mosaic.api.errors import UnsupportedError
from mosaic.runtime.many_lengths import ManyLengths, is_open, of_length
from mosaic.runtime.sharded_tensor import (
    ATTENTION,
    READS,
    RUN,
    ShardedTensor,
    is_traced,
    uncompiled,
    with_whole_gradient,
)
from mosaic.torch_private import pytree, without_torch_function

aten = torch.ops.aten
#: What is dear to do twice.
PRODUCTS = (aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default)
#: Leaves that may have other values than they had, of which nobody can tell.
EXPIRED: Any = WeakTensorKeyDictionary()
#: The leaf of what has none: Dynamo takes no tensor without one.
NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Ref:
    """In a step's arguments: value number ``index``, of the leaves and then of the steps."""

    index: int


@dataclass(frozen=True)
class SizeOf:
    """In a step's arguments, while a unit is called for all lengths of a bucket: the size of the
    deferred tensor along ``dim``."""

    dim: int


@dataclass(frozen=True)
class Step:
    """One op of ATen. Lists in its arguments are tuples: programs are compared."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Steps = tuple[Step, ...]
Meta = tuple[Steps, torch.dtype, torch.device]


class Leaf(NamedTuple):
    """What is known of a leaf before it is there; ``given``: the number of the input that it is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    given: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A deferred tensor without its leaves."""

    steps: Steps
    leaves: tuple[Leaf, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def of(self, leaves: Sequence[Tensor]) -> DeferredTensor:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        found: DeferredTensor = Learned.apply(self, *leaves) if learns else self.plain(leaves)
        return found

    def plain(self, leaves: Sequence[Tensor]) -> DeferredTensor:
        meta = (self.steps, self.dtype, self.device)
        found: DeferredTensor = DeferredTensor(leaves or (NOTHING,), self.shape, meta)
        return found


class DeferredTensor(ManyLengths):
    """What the last of ``steps`` gives, of ``leaves``. One that has a gradient is the result of an
    autograd.Function (``Learned``): autograd works above all that is said here."""

    steps: Steps
    leaves: tuple[Tensor, ...]
    base: DeferredTensor | None = None  # of a view
    kept: Tensor | None = None  # what was made, if that is dear
    views: list[weakref.ref[DeferredTensor]]

    @staticmethod
    def __new__(
        cls, leaves: Sequence[Tensor], shape: Sequence[int], meta: Meta
    ) -> Any:  # an object of the wrapped shape, without memory
        _, dtype, device = meta
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, torch.Size(shape), dtype=dtype, device=device
        )

    def __init__(self, leaves: Sequence[Tensor], shape: Sequence[int], meta: Meta):
        self.set(meta[0], leaves)
        self.views = []

    def look_at(self, other: DeferredTensor) -> None:
        """This is a view of the other one, as it is now."""
        self.base = other if other.base is None else other.base
        self.base.views.append(weakref.ref(self))

    @property
    def has_others(self) -> bool:
        """Whether a write to it would be seen by others: what it is a view of, or views of it."""
        return self.base is not None or any(view() is not None for view in self.views)

    def set(self, steps: Steps, leaves: Sequence[Tensor]) -> None:
        """Another program for the same tensor: it was written to."""
        self.steps, self.leaves, self.kept = steps, tuple(leaves), None
        self._versions = [version(leaf) for leaf in leaves]
        for number, leaf in enumerate(leaves):
            setattr(self, f"leaf_{number}", leaf)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Meta, tuple[bool, ...], int | None]]:
        """With the meta which leaves are learned: fake ones that Dynamo makes do not know. And
        which dim has the length, if it is one of many."""
        names = [f"leaf_{number}" for number in range(len(self.leaves))]
        learned = tuple(x.requires_grad for x in self.leaves) if self.requires_grad else ()
        steps, dim = self.bucket or (self.steps, None)
        return names, ((steps, self.dtype, self.device), learned, dim)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], known: tuple[Meta, Any, int | None], shape: Any, stride: Any
    ) -> DeferredTensor:
        meta, learned, dim = known
        leaves = [*inner.values()]
        if dim is not None:  # Dynamo has no symbols for sizes of a leaf that wraps others itself
            leaves = [of_length(x, shape[dim]) if is_open(x) else x for x in leaves]
        for leaf in compress(leaves, learned):
            leaf.requires_grad_()
        x: DeferredTensor = DeferredTensor(leaves, shape, meta)
        x.bucket = None if dim is None else (meta[0], dim)
        return x

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredTensor(shape={list(self.shape)}, {self.dtype}, of {len(self.steps)} ops)"

    @classmethod
    @uncompiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return RUN["op"](func, args, kwargs or {})

    @classmethod
    @uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return func(args[0].made(), *args[1:], **(kwargs or {}))
        if func is ATTENTION and not is_traced(args, kwargs or {}):
            return RUN["attention"](*args, **(kwargs or {}))
        if func is F.cross_entropy and args and isinstance(args[0], DeferredTensor):
            if args[0].is_dear and not is_traced(args, kwargs or {}):
                return RUN["loss"](*args, **(kwargs or {}))
        if func is torch.diff:  # which torch would take apart: masks are read by it
            return RUN["op"](torch.ops.aten.diff.default, *diff_arguments(*args, **(kwargs or {})))
        with without_torch_function():
            return func(*args, **(kwargs or {}))

    @uncompiled
    def made(self) -> Tensor:
        """The tensor; a ShardedTensor where its rows come from one. A product is made once."""
        if self.kept is not None:
            return self.kept
        made = carried_out(self.steps, self.current())
        if self.is_dear:
            self.kept = made
        return made

    @uncompiled
    def with_history(self) -> Tensor:
        """What ``made`` gives, with its gradient."""
        return carried_out(self.steps, [with_whole_gradient(x) for x in flattened([self])])

    def full_tensor(self) -> Tensor:
        """The whole on every rank; differentiable. All ranks must call it."""
        found = self.with_history()
        return found.full_tensor() if isinstance(found, ShardedTensor) else found

    @property
    def local(self) -> Tensor:
        """This rank's part; differentiable."""
        found = self.with_history()
        return found.local if isinstance(found, ShardedTensor) else found

    @property
    def is_dear(self) -> bool:
        """Whether it is no pattern, but a product: logits."""
        return any(step.op in PRODUCTS for step in self.steps)

    def current(self) -> tuple[Tensor, ...]:
        """The leaves. Raises UnsupportedError if one was written to since."""
        if any(map(is_lost, self.leaves)) or [*map(version, self.leaves)] != self._versions:
            raise UnsupportedError(
                "logits that were not kept are read behind a write to what they are made of"
                if self.is_dear
                else "a mask is read behind a write to what it was made of",
                sizes=f"{'the logits' if self.is_dear else 'the mask'} {list(self.shape)}, "
                f"made of {', '.join(str(list(leaf.shape)) for leaf in self.leaves)}",
                fix="read them in the step that made them, before backward and optimizer.step()"
                if self.is_dear
                else "write into a copy, or make the mask after the write",
            )
        return self.leaves


class Learned(torch.autograd.Function):
    """A deferred tensor with a gradient (logits). Backward carries its program out again, on what
    its leaves were."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *leaves: Tensor) -> DeferredTensor:
        ctx.steps = recipe.steps
        ctx.save_for_backward(*leaves)
        return recipe.plain(leaves)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        pairs = zip(ctx.saved_tensors, needed, strict=True)
        leaves = [x.detach().requires_grad_(learns) for x, learns in pairs]
        with torch.enable_grad():
            out = carried_out(ctx.steps, leaves)
        learned = [x for x in leaves if x.requires_grad]
        grads = iter(torch.autograd.grad(out, learned, dout))
        return (None, *(next(grads) if learns else None for learns in needed))


def carried_out(steps: Steps, leaves: Sequence[Tensor]) -> Tensor:
    """What a program gives. Its casts are steps: autocast is off."""
    devices = {x.device.type for x in leaves}
    with making(), torch.autocast(next(iter(devices), "cpu"), enabled=False):
        made: Tensor = run(steps, leaves, call)
    return made


def flattened(values: Sequence[Any]) -> list[Any]:
    """A call's arguments, with the leaves of those that are deferred in their place; detached
    where the deferred tensor is."""
    found: list[Any] = []
    for value in values:
        if not isinstance(value, DeferredTensor):
            found.append(value)
        elif value.requires_grad:
            found += value.current()
        else:
            found += [x.detach() if x.requires_grad else x for x in value.current()]
    return found


def regrouped(
    values: Sequence[Any], like: Sequence[Any], size: Callable[[Any], int] = int
) -> list[Any]:
    """The arguments again, those deferred made, of what ``flattened(like)`` stands for; ``size``
    gives the sizes that Dynamo left open."""
    rest = iter(values)
    return [
        run(closed(x.steps, [*map(size, x.shape)]), [next(rest) for _ in x.leaves], call)
        if isinstance(x, DeferredTensor)
        else next(rest)
        for x in like
    ]


def closed(steps: Steps, shape: Sequence[int]) -> Steps:
    """A program at known sizes."""

    def known(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(known, x))
        return shape[x.dim] if isinstance(x, SizeOf) else x

    return tuple(Step(step.op, known(step.args), known(step.kwargs)) for step in steps)


def diff_arguments(
    x: Tensor, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of ``torch.diff``, as a compiled graph has them."""
    return (x, n, dim, prepend, *(() if append is None else (append,))), {}


def is_lost(x: Tensor) -> bool:
    """Whether FSDP2 has let go of a parameter's memory, or may have other values in it by now."""
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0
    return x in EXPIRED or (is_plain and x.untyped_storage().size() == 0)


def version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def call(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return step.op(*args, **kwargs)


def run(steps: Steps, leaves: Sequence[Any], one: Callable[..., Any]) -> Any:
    """The last value; ``one(step, args, kwargs)`` gives a step's, of the values it refers to."""
    values = list(leaves)

    def value(x: Any) -> Any:
        return values[x.index] if isinstance(x, Ref) else x

    for step in steps:
        args, kwargs = pytree.tree_map(value, (step.args, dict(step.kwargs)))
        values.append(one(step, args, kwargs))
    return values[-1]


def joined(op: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Steps, list[Tensor]]:
    """The program of ``op`` on tensors of which some are deferred; equal steps stand once."""
    leaves: list[Tensor] = []
    numbers: dict[int, int] = {}
    operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    for x in operands:
        for leaf in x.current() if isinstance(x, DeferredTensor) else (x,):
            if id(leaf) not in numbers:
                numbers[id(leaf)] = len(leaves)
                leaves.append(leaf)
    steps: dict[Step, int] = {}

    def place(x: Any) -> Any:
        if isinstance(x, DeferredTensor):
            refs = [Ref(numbers[id(leaf)]) for leaf in x.leaves]
            return run(x.steps, refs, add)
        return Ref(numbers[id(x)]) if isinstance(x, Tensor) else x

    def add(step: Step, args: Any, kwargs: Any) -> Ref:
        new = step_of(step.op, args, kwargs)
        return Ref(steps.setdefault(new, len(leaves) + len(steps)))

    args, kwargs = pytree.tree_map(place, (args, kwargs))
    add(Step(of_any_strides(op), ()), args, kwargs)
    return tuple(steps), leaves


def of_any_strides(op: Any) -> Any:
    """A deferred tensor is contiguous, and torch takes a reshape of it for a view: what is made in
    its place (a slice of labels) may have other strides."""
    return torch.ops.aten.reshape.default if op == torch.ops.aten.view.default else op


def step_of(op: Any, args: Any, kwargs: Mapping[str, Any]) -> Step:
    """A call of ``op`` whose tensors are ``Ref``s already."""
    return Step(op, frozen(args), tuple(sorted((k, frozen(v)) for k, v in kwargs.items())))


def frozen(x: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(frozen, x)) if isinstance(x, (list, tuple)) else x


_local = threading.local()


@contextmanager
def making() -> Iterator[None]:
    """While a tensor is made nothing is deferred."""
    before, _local.making = is_making(), True
    try:
        yield
    finally:
        _local.making = before


def is_making() -> bool:
    return getattr(_local, "making", False)
