"""The table of 150,000 rows on one GPU: does it run, how long does it take, how much does it hold.

    python tests/gpu/check_table.py [--without-flash-attn] [--skip batches short float32 ...]
    python tests/gpu/check_table.py --device cpu --rows 300        # that it works, at small sizes

First every kernel at batches of 65,535, 65,536 and 600,000 against plain math in float64; then the
times of kernels for short sequences; then a model in the way of nanoTabPFN (nn.MultiheadAttention
with its default need_weights, which folds heads into the batch): 10 columns, 3 layers, embed 96, 4
heads. 150,000 rows forward and training, in bfloat16 autocast and in float32; 1,000,000 rows
forward as one rank of 16, whose collectives are a fake process group's: they send nothing and take
no time. Plain PyTorch would keep rows x rows weights (3 TB in float32). A short table comes last.
Exits 1 if something is wrong or fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from models.table import TableModel  # noqa: E402
from torch import Tensor  # noqa: E402

import mosaic  # noqa: E402
from mosaic.api.errors import UnsupportedError  # noqa: E402
from mosaic.attention import kernels  # noqa: E402
from mosaic.attention.kernels import flash_attn  # noqa: E402
from mosaic.attention.kernels.math import MATH  # noqa: E402
from mosaic.report.plan import LISTENERS  # noqa: E402
from mosaic.torch_private import FakeStore  # noqa: E402

COLUMNS, RANKS = 10, 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPTIONS = {"band": (None, None), "mask": None, "scale": 24**-0.5, "keep": None}
#: Of results and gradients, relative to their norm.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
#: A first run that takes longer is not repeated: what it compiled before is not counted.
LONG = 5.0


@dataclass(frozen=True)
class Run:
    """One program of the last table."""

    rows: int
    dtype: str
    training: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        what = "training" if self.training else "forward"
        of = f", one rank of {self.ranks}" if self.ranks > 1 else ""
        return f"{self.rows:,} rows{of}, {self.dtype}, {what}"


def say(words: str = "") -> None:
    print(words, flush=True)


# --- kernels --------------------------------------------------------------------------------------


def names(dtype: torch.dtype, device: torch.device) -> list[str]:
    """The kernels that this machine has for short sequences."""
    q = torch.zeros(1, 1, 11, 24, dtype=dtype, device=device)
    case = kernels.Case.of(q, q, q, None, False)
    return [kernel.name for kernel in kernels.KERNELS if kernel.fits(case)]


def tensors(batch: int, heads: int, n: int, dtype: torch.dtype, device: torch.device):
    """q, k, v, dout."""
    torch.manual_seed(0)
    return [torch.randn(batch, heads, n, 24, device=device).to(dtype) for _ in range(4)]


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check_batches(given: argparse.Namespace) -> list[str]:
    """What is wrong with kernels at many batches: each in turn, and the one that is chosen."""
    wrong = []
    sizes = (65535, 65536, 600000) if given.cuda else (7, 8, 60)
    say(
        "largest relative error of the output and of gradients, sequences of 11 tokens, head dim 24"
    )
    for name, dtype in DTYPES.items():
        for batch in sizes:
            q, k, v, dout = tensors(batch, 1, 11, dtype, given.device)
            exact = [x.double() for x in (q, k, v)]
            out, lse = MATH.forward(*exact, **OPTIONS, shift=None)
            rest = {**OPTIONS, "shift": None, "need_dmask": False}
            want = [out, *MATH.backward(dout.double(), *exact, out, lse, **rest)[:3]]
            for kernel in names(dtype, given.device):
                try:
                    with kernels.using(kernel):
                        out, lse = kernels.forward(q, k, v, **OPTIONS)
                        got = [out, *kernels.backward(dout, q, k, v, out, lse, **OPTIONS)[:3]]
                    error = max(map(apart, got, want))
                    is_wrong, words = not error <= TOLERANCE[name], f"{error:.1e}"
                except Exception as failure:
                    is_wrong, words = True, f"fails: {str(failure).splitlines()[:1]}"
                line = f"{name}, batch {batch:,}, {kernel}: {words}"
                say(f"  {line}{'!' if is_wrong else ''}")
                wrong += [line] if is_wrong else []
    return wrong


def milliseconds(fn: Callable[[], object], given: argparse.Namespace) -> float:
    """The median of some calls after two others."""
    times = []
    for _ in range(7):
        start = now(given)
        fn()
        times.append(now(given) - start)
    return 1e3 * median(times[2:])


def show_short(given: argparse.Namespace) -> None:
    tokens = 550_000 if given.cuda else 550
    say(f"\nmilliseconds forward, backward; {tokens:,} tokens in sequences, 4 heads of 24")
    for name, dtype in DTYPES.items():
        for n in (11, 32, 64, 128, 256, 512):
            cells = []
            q, k, v, dout = tensors(tokens // n, 4, n, dtype, given.device)
            for kernel in names(dtype, given.device):
                if kernel == "math" and n > 128:
                    continue
                cells.append(f"{kernel} {short_times(kernel, (q, k, v, dout), given)}")
            say(f"  {name}, {n:>3} tokens: {'; '.join(cells)}")


def short_times(kernel: str, given_to: tuple[Tensor, ...], given: argparse.Namespace) -> str:
    q, k, v, dout = given_to
    try:
        with kernels.using(kernel):
            out, lse = kernels.forward(q, k, v, **OPTIONS)
            forward = milliseconds(lambda: kernels.forward(q, k, v, **OPTIONS), given)
            backward = milliseconds(
                lambda: kernels.backward(dout, q, k, v, out, lse, **OPTIONS), given
            )
    except UnsupportedError:
        return "-"
    except Exception as failure:
        return f"fails ({type(failure).__name__})"
    return f"{forward:.2f}, {backward:.2f}"


# --- the model ------------------------------------------------------------------------------------


@contextmanager
def ranks(count: int, device: torch.device) -> Iterator[None]:
    """Rank 0 of a world whose collectives do nothing."""
    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    context = mosaic.init(sp_size=count, device=device)
    try:
        yield
    finally:
        context.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()


def model_of(given: argparse.Namespace) -> TableModel:
    torch.manual_seed(0)
    return TableModel(embed=96, heads=4, hidden=192, layers=3, outputs=2).to(given.device)


def table(rows: int, given: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, rows, columns), y (1, known rows), and the classes of the others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, rows, COLUMNS, generator=draw)
    classes = (x[..., 0] * x[..., 1] > x[..., 2]).long()
    known = int(rows * given.known)
    y, targets = classes[:, :known].float(), classes[0, known:]
    return x.to(given.device), y.to(given.device), targets.to(given.device)


def step(
    called: Callable[..., Tensor], data: tuple[Tensor, ...], run: Run, given: argparse.Namespace
) -> Tensor:
    """The loss; in training the parameters get their gradients."""
    x, y, targets = data
    autocast = torch.autocast(given.device.type, torch.bfloat16, run.dtype == "bfloat16")
    with autocast, torch.set_grad_enabled(run.training):
        loss = F.cross_entropy(called(x, y, y.shape[1]).squeeze(0).float(), targets)
    if run.training:
        loss.backward()
    return loss.detach()


def compiled(model: TableModel, given: argparse.Namespace) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    spec = mosaic.ShardingSpec(inputs={"x": "batch rows columns"}, axes={"rows": "auto"})
    return torch.compile(model, backend="mosaic", options={"spec": spec, "inner": given.inner})


def now(given: argparse.Namespace) -> float:
    if given.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def forget(given: argparse.Namespace) -> None:
    """What is no longer used, and how much it was."""
    gc.collect()
    if given.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Taken:
    """Seconds of a step, of its first or its second run; GiB at most; seconds of compiling."""

    seconds: float
    peak: float
    kind: str
    compiling: float

    def __str__(self) -> str:
        how = f"({self.kind}; compiled in {self.compiling:.0f} s)"
        return f"{self.seconds:8.2f} s {self.peak:7.2f} GiB   {how}"


def slowest(seconds: float, given: argparse.Namespace) -> float:
    """Of all ranks, which then decide alike."""
    found = torch.tensor(seconds, device=given.device)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def measured(
    run: Run, given: argparse.Namespace, world: AbstractContextManager[None] | None = None
) -> Taken:
    """``world``: of ranks that are there; without it rank 0 of fake ones."""
    forget(given)
    model = model_of(given).train(run.training)
    data = table(run.rows, given)
    ready: list[float] = []

    def listen(plan: object) -> None:
        ready.append(now(given))

    LISTENERS.append(listen)
    try:
        with world or ranks(run.ranks, given.device):
            called = compiled(model, given)
            start = now(given)
            step(called, data, run, given)
            first, kind = slowest(now(given) - ready[-1], given), "first run"
            if first < LONG or not given.cuda:
                model.zero_grad()
                forget(given)
                begin = now(given)
                step(called, data, run, given)
                first, kind = now(given) - begin, "second run"
            peak = torch.cuda.max_memory_allocated() / 2**30 if given.cuda else 0.0
    finally:
        LISTENERS.remove(listen)
    return Taken(first, peak, kind, ready[-1] - start)


def check_model(given: argparse.Namespace) -> list[str]:
    """A table that plain PyTorch can do, too: what is further from it than it should be."""
    wrong = []
    rows = 3000 if given.cuda else 200
    data = table(rows, given)
    found: dict[str, list[Tensor]] = {}
    for name, is_plain in (("plain", True), *((dtype, False) for dtype in given.dtypes)):
        model = model_of(given)
        run = Run(rows, "float32" if is_plain else name, training=True)
        with ranks(1, given.device):
            called = model if is_plain else compiled(model, given)
            loss = step(called, data, run, given)
        found[name] = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    say(f"\nlargest relative difference to plain PyTorch in float32, {rows:,} rows, training")
    scale = max(float(x.norm()) for x in found["plain"])
    for name in given.dtypes:
        pairs = zip(found[name], found["plain"], strict=True)
        error = max(float((a - b).norm()) for a, b in pairs) / scale
        is_wrong = not error <= TOLERANCE[name]
        say(f"  {name}: {error:.1e}{'!' if is_wrong else ''}")
        wrong += [f"{name} differs from plain PyTorch by {error:.1e}"] if is_wrong else []
    return wrong


def runs(given: argparse.Namespace) -> list[Run]:
    found = []
    for dtype in given.dtypes:
        found += [Run(given.rows, dtype, training) for training in (False, True)]
    return [*found, Run(given.rows * 20 // 3, given.dtypes[0], ranks=RANKS)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--known", type=float, default=0.9, help="share of rows with a class")
    parser.add_argument("--inner", choices=["eager", "inductor"], help="inductor on GPUs")
    parser.add_argument("--without-flash-attn", action="store_true", help="as if not installed")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=["batches", "short", "model", "runs", *DTYPES]
    )
    given = parser.parse_args()
    given.device = torch.device(given.device)
    given.cuda = given.device.type == "cuda"
    given.inner = given.inner or ("inductor" if given.cuda else "eager")
    given.dtypes = [name for name in DTYPES if name not in given.skip]
    return given


def main() -> int:
    given = parsed()
    if given.without_flash_attn:
        flash_attn._installed = lambda: False
    where = torch.cuda.get_device_name() if given.cuda else "CPU"
    have = names(torch.bfloat16, given.device)
    say(f"torch {torch.__version__}, {where}; kernels for bfloat16: {', '.join(have)}\n")
    wrong = [] if "batches" in given.skip else check_batches(given)
    if "short" not in given.skip:
        show_short(given)
    try:
        wrong += [] if "model" in given.skip else check_model(given)
    except Exception as failure:
        wrong.append(f"the small model fails: {type(failure).__name__}: {str(failure)[:200]}")
        say(wrong[-1])
    lines = []
    say()
    for run in [] if "runs" in given.skip else runs(given):
        try:
            lines.append(f"{run!s:<50}{measured(run, given)!s}")
        except Exception as failure:
            lines.append(f"{run!s:<50}fails: {type(failure).__name__}: {str(failure)[:200]}")
            wrong.append(lines[-1])
        say(lines[-1])
    say(f"\n{where}, kernels: {', '.join(have)}; {given.known:.0%} of the rows have a class")
    say("\n".join([*lines, "", *(wrong or ["all right"])]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
