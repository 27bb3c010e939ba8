"""One attention on all ranks, by each method and by torch's ``context_parallel``: milliseconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median

import check_mask_rates
import torch
import torch.distributed as dist
import torch_context_parallel as theirs
from case_runner import CUDA, Case, Row, Setting
from check_methods import leaves, methods_for, mine, one_gpu, text
from exposed import with_profile
from torch import Tensor

import mosaic
from mosaic.api.methods import Auto, Method, key_of
from mosaic.attention.blocks import Band
from mosaic.attention.problem import AttentionProblem
from mosaic.attention.resolve import machine_of, strategy_of
from mosaic.attention.timing import seconds_of
from mosaic.layout import Layout
from mosaic.runtime.world import world_of

DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS, KV_HEADS, DIM = (32, 8, 128) if CUDA else (4, 2, 16)
ONE_GPU = "one GPU, equal work"
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """Causal, of ``tokens`` in all; ``window``: keys that a query sees; ``documents``: how many."""

    tokens: int
    window: int = 0
    documents: int = 0

    def __str__(self) -> str:
        what = f", {self.documents} documents" * bool(self.documents)
        what += f", window {self.window:,}" * bool(self.window)
        return f"{self.tokens:,} tokens, causal{what}"

    @property
    def band(self) -> Band:
        return Band(self.window - 1 if self.window else None, 0)

    def ids(self, device: torch.device) -> Tensor:
        each = -(-self.tokens // max(1, self.documents))
        return torch.arange(self.tokens, device=device) // each

    def mask_mod(self, ids: Tensor) -> Callable[..., Tensor]:
        """As flex has it."""
        near = self.window or self.tokens

        def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < near) & (ids[i] == ids[j])

        def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < near)

        return mod if self.documents else band

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Whole q, k, v and dout, the same on every rank."""
        torch.manual_seed(0)
        counts = (HEADS, KV_HEADS, KV_HEADS, HEADS)
        make = (torch.randn(1, h, self.tokens, DIM, device=device) for h in counts)
        return tuple(x.to(DTYPE) for x in make)

    @property
    def pairs(self) -> float:
        """Of queries and keys that they see."""
        each, w = self.tokens / max(1, self.documents), self.window
        seen = each**2 / 2 if not w or w > each else each * w - w**2 / 2
        return seen * max(1, self.documents)

    def of_one_rank(self, p: int) -> Attention:
        """An attention of a ``p``-th of the pairs, of the same kind."""
        if self.documents:
            count = max(1, self.documents // p)
            shrink = math.sqrt(self.documents / p / count)
            return Attention(count * rounded(self.tokens / self.documents * shrink), 0, count)
        if self.window and self.window < self.tokens / p:
            return Attention(
                rounded(self.pairs / p / self.window + self.window / 2), window=self.window
            )
        return Attention(rounded(self.tokens / math.sqrt(p)), window=self.window)

    def problem(self, p: int) -> AttentionProblem:
        """Documents are left out: their number is data."""
        layout = Layout.even(self.tokens, p)
        sizes = (1, HEADS, KV_HEADS, DIM, DIM, DTYPE.itemsize)
        found = AttentionProblem(layout, layout, *sizes, self.band)
        if self.documents and CUDA:
            layout = Layout.zigzags(self.tokens, p)
        elif not found.is_window:
            layout = Layout.zigzag(self.tokens, p)
        return replace(found, query=layout, key=layout)


def rounded(tokens: float) -> int:
    return max(1, round(tokens / 128)) * 128 if CUDA else max(1, round(tokens))


# --- milliseconds ---------------------------------------------------------------------------------


def stepping(call: Call, tensors: tuple[Tensor, ...]) -> Callable[[], list]:
    """A forward and a backward; marks before, between and behind them."""
    q, k, v, dout = tensors
    q, k, v = leaves(q, k, v)

    def step() -> list:
        marks = [mark()]
        out = call(q, k, v)
        marks.append(mark())
        torch.autograd.grad(out, (q, k, v), dout)
        return [*marks, mark()]

    return step


def timed(call: Call, tensors: tuple[Tensor, ...]) -> dict[str, float]:
    """Medians of forward and backward, of the slowest rank; all begin together."""
    once = stepping(call, tensors)

    def step() -> list[float]:
        dist.barrier()
        return between(once())

    warm = slowest([step() for _ in range(3)][2])
    found = [step() for _ in range(min(10, max(3, int(1500 / (sum(warm) + 1e-6)))) if CUDA else 1)]
    forward, backward = slowest([median(column) for column in zip(*found, strict=True)])
    return {"forward ms": forward, "backward ms": backward, "both ms": forward + backward}


def mark() -> torch.cuda.Event | float:
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: list) -> list[float]:
    """Milliseconds from each to the next."""
    if not CUDA:
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def slowest(taken: list[float]) -> list[float]:
    found = torch.tensor(taken, device="cuda" if CUDA else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def measured(
    call: Call, tensors: tuple[Tensor, ...], row: Row, pairs: float, setting: Setting
) -> list[Row]:
    """The row with its times and the TFLOP/s of one GPU that has done so many pairs."""
    took = timed(call, tensors)
    rate = {"TFLOP/s": 3.5 * 4 * HEADS * DIM * pairs / took["both ms"] / 1e9}
    row = replace(row, numbers=took | rate | row.numbers)
    return [*with_profile(row, stepping(call, tensors), setting)]


# --- ways -----------------------------------------------------------------------------------------


def by_method(x: Attention, method: Method, setting: Setting) -> Iterator[Row]:
    context = setting.here
    p, rank = context.size(), context.rank()
    problem, world = x.problem(p), world_of(context, "sp")
    strategy, _ = strategy_of(method, problem, machine_of(world))
    predicted = seconds_of(strategy, problem, world.node_size).total * 1e3
    layout, name = problem.query, key_of(method)  # torch 2.11 wants a string
    ids = x.ids(context.device) if x.documents else None

    def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
        return mosaic.attention(
            q, k, v, name, window=tuple(x.band), query_documents=ids, layout=layout
        )

    inner = {"inner": "inductor" if CUDA else "eager"}
    called = torch.compile(run, backend="mosaic", options=inner, fullgraph=True, dynamic=False)
    parts = tuple(mine(t, layout, rank) for t in x.tensors(context.device))
    way = f"auto: {strategy.name}" if isinstance(method, Auto) else text(method)
    row = Row(str(x), way, {} if x.documents else {"predicted ms": predicted})
    yield from measured(lambda q, k, v: called(q, k, v, ids), parts, row, x.pairs / p, setting)


def alone(x: Attention, setting: Setting) -> Iterator[Row]:
    """As many pairs on one GPU: by the kernel of the table where the mask is causal, else by
    flex."""
    device, p = setting.here.device, setting.here.size()
    less, has_mask = x.of_one_rank(p), bool(x.window or x.documents)
    call: Call = one_gpu
    if has_mask and not CUDA:
        return  # flex has no backward there
    if has_mask:
        rate = check_mask_rates.Rate("", less.tokens, None, less.mask_mod)
        call = check_mask_rates.by_flex(rate, less.ids(device), "")
    row, setting = Row(str(x), ONE_GPU + ", flex" * has_mask), replace(setting, profile=False)
    yield from measured(call, less.tensors(device), row, less.pairs, setting)


def by_torch(x: Attention, mode: theirs.Mode, setting: Setting) -> Iterator[Row]:
    if not CUDA:
        return  # it has no kernel for CPUs
    context, tensors = setting.here, x.tensors(setting.here.device)
    assert context.mesh is not None
    mesh, row = context.mesh["sp"], Row(str(x), str(mode))
    measure = partial(measured, row=row, pairs=x.pairs / context.size(), setting=setting)
    if mode.kernel == "flex":
        mod = x.mask_mod(x.ids(context.device))
        yield from theirs.flex(tensors, mod, x.documents, mesh, measure)
    else:
        yield from theirs.sdpa(tensors, mode, mesh, measure)


def cases(x: Attention, p: int, seconds: float = 60) -> list[Case]:
    """One GPU first: the others are measured by it."""
    found = [Case(str(x), partial(alone, x), seconds)]
    for method in [Auto(), *methods_for(p)]:
        found.append(Case(f"{x}: {text(method)}", partial(by_method, x, method), seconds))
    for mode in theirs.modes(x.documents, x.window):
        found.append(Case(f"{x}: {mode}", partial(by_torch, x, mode), seconds))
    return found
