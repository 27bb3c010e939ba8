"""Ordinary programs that were silently wrong, or ended the process, on several ranks: by cause.

Each is run by ``tests/ranks/test_exact.py`` as a user runs it, and compared with eager: outputs,
gradients, and what inputs and buffers are afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mosaic

sdpa = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Program:
    """A model and its inputs, made anew for each run; ``refusal``: how the refusal begins."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    refusal: str = ""
    spec: mosaic.ShardingSpec = field(default_factory=mosaic.ShardingSpec)


PROGRAMS: dict[str, Program] = {}


class Function(nn.Module):
    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> Any:
        return self.run(*args)


def add(name: str, run: Callable[..., Any], *inputs: Any, **kwargs: Any) -> None:
    """A function of tensors; each input is a shape, or makes one."""

    def made() -> tuple[Any, ...]:
        return tuple(randn(*x) if isinstance(x, tuple) else x() for x in inputs)

    add_model(name, lambda: Function(run), made, **kwargs)


def add_model(
    name: str, model: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], **kwargs: Any
) -> None:
    assert name not in PROGRAMS, name
    PROGRAMS[name] = Program(model, inputs, **kwargs)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


X = (2, 7, 8)


def attended(x: Tensor) -> Tensor:
    return sdpa(x, x, x)


def heads(x: Tensor, n: int = 4) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


# --- strides: a kernel, or an op, that reads memory and not the tensor ---------------------------


def strided_heads(x: Tensor) -> Tensor:
    q = x.mT
    return sdpa(q, q.sin(), q.cos())


add("head dim with a stride", strided_heads, (2, 8, 7))
add("head dim with a stride, causal", lambda x: sdpa(x.mT, x.mT, x.mT, is_causal=True), (2, 8, 7))
add("head dim in steps", lambda x: sdpa(*[x[..., ::2]] * 3), (2, 7, 8))
add("head dim of one number", lambda x: sdpa(*[x[..., :1].expand(X)] * 3), X)
add("unfold", lambda x: attended(x).mT.unfold(2, 3, 1).mean(-1), X)
add("as_strided", lambda x: attended(x).mT.as_strided((3, 4, 2), (20, 3, 2), 4).sin(), X)
add("as_strided of an input", lambda x: attended(x) + x.mT.as_strided((7,), (7,)), (2, 8, 7))


add(
    "as_strided from a place in memory, of a view",
    lambda x: attended(x) + x.as_strided(X, (0, 8, 1), 56),
    lambda: torch.randn(3, 7, 8, dtype=torch.float64)[1:].requires_grad_(),
    refusal="as_strided.default reads memory that is not that of its own tensor alone",
)


def strided_written(x: Tensor) -> Tensor:
    y = attended(x) * 1
    y.as_strided((2, 7), (56, 8)).fill_(2.0)
    return y


def unfold_written(x: Tensor, dim: int) -> Tensor:
    y = attended(x) * 1
    y.unfold(dim, 2, 2).add_(1.5)
    return y


WRITTEN = "a view that as_strided or unfold made is written to"
add("as_strided, written to", strided_written, X, refusal=WRITTEN)
add("unfold, written to", lambda x: unfold_written(x, 1), X, refusal=WRITTEN)
add("unfold of all, written to", lambda x: unfold_written(x, 2), X)
add(
    "as_strided of a slice",
    lambda x: attended(x)[:, 1:].as_strided((3, 4), (2, 1)),
    X,
    refusal="as_strided.default reads memory that is not that of its own tensor alone",
)
add("unfold of another dim", lambda x: attended(x).unfold(2, 3, 2).mean(-1), X)

# --- heads ---------------------------------------------------------------------------------------


def repeated_tokens(x: Tensor, *mask: Tensor) -> Tensor:
    k = x.repeat_interleave(2, 1)
    return sdpa(x, k, k, *mask, is_causal=not mask)


def repeated_apart(x: Tensor) -> Tensor:
    q = heads(x, 6)
    return sdpa(q, q[:, :3].repeat_interleave(2, 1), q[:, 3:5].repeat_interleave(3, 1))


add("keys repeated along their tokens", repeated_tokens, X)
add("keys repeated along their tokens, a mask", repeated_tokens, X, (7, 14))
add("keys and values repeated unequally", repeated_apart, (2, 7, 12))
add(
    "one query head for repeated keys",
    lambda x: sdpa(heads(x)[:, :1], *[heads(x)[:, :2].repeat_interleave(2, 1)] * 2),
    X,
)
add(
    "other heads of keys than of values",
    lambda x: sdpa(heads(x), heads(x)[:, :2], heads(x)[:, :1], enable_gqa=True),
    X,
)
add("one head of keys", lambda x: sdpa(heads(x), heads(x)[:, :1], heads(x)), X)
add("one head of values, causal", lambda x: sdpa(heads(x), heads(x), heads(x)[:, 1:2]), X)

# --- scales that are not positive ----------------------------------------------------------------

for scale in (-0.5, 0.0, -1e-3):
    for name, options in {"causal": {"is_causal": True}, "full": {}}.items():
        add(
            f"scale {scale}, {name}",
            lambda x, scale=scale, options=options: sdpa(x, x, x.sin(), scale=scale, **options),
            X,
        )


def across_heads(x: Tensor, scale: float) -> Tensor:
    """Of every token the heads attend to the heads before them: ``aten``'s kernel makes NaN of
    ``is_causal`` with such a scale."""
    q = heads(attended(x)).transpose(1, 2)
    i = torch.arange(q.shape[-2])
    return sdpa(q, q, q.sin(), i[:, None] >= i, scale=scale)


for scale in (-0.5, 0.0):
    add(f"scale {scale}, whole, causal mask", partial(across_heads, scale=scale), X)

# --- complex numbers -----------------------------------------------------------------------------


def as_complex(x: Tensor) -> Tensor:
    y = attended(x)
    return torch.complex(y, y.sin())


add("complex sum", lambda x: attended(x) * as_complex(x).sum().real, X)
add("complex mean over the axis", lambda x: as_complex(x).mean(1), X)
add("complex row", lambda x: as_complex(x)[:, 2] * 1j, X)
add("complex variance", lambda x: as_complex(x).var(1), X)
add("complex conjugate", lambda x: as_complex(x).conj()[:, 1:].sum(2), X)
add("complex whole", lambda x, w: (as_complex(x) * torch.complex(w, w)).abs(), X, (8,))
add("complex slices", lambda x: as_complex(x)[:, 1:] * as_complex(x)[:, :-1], X)

# --- maxima of nan, infinity and ties ------------------------------------------------------------


def peaks(x: Tensor) -> Tensor:
    """Along the axis: a nan in one column, ties, and infinities in others."""
    y = attended(x).mul(2).round().div(2) + (x - x.detach())
    y = torch.where(torch.arange(8) == 1, (y - 0.4).sqrt(), y)
    rows = torch.arange(7)[:, None]
    return torch.where((torch.arange(8) == 2) & (rows % 3 == 1), torch.inf, y)


for name, run in {
    "amax": lambda y: y.amax(1),
    "amin": lambda y: y.amin((1, 2)),
    "max": lambda y: y.max(),
    "min": lambda y: y[..., 3:].min(),
    "min with nan": lambda y: y.min(),
    "max dim": lambda y: y.max(1),
    "aminmax": lambda y: torch.aminmax(y, dim=1),
    "logsumexp": lambda y: y[..., 3:].logsumexp(1),
    "softmax": lambda y: y[..., 1:].softmax(1),
    "softmin": lambda y: (-y).log_softmax(1),
    "cummax": lambda y: y.cummax(1)[0],
    "norm of infinity": lambda y: torch.linalg.vector_norm(y, torch.inf, 1),
    "clamped": lambda y: y.clamp(max=y.detach().nan_to_num(0, 0, 0).amax(1, keepdim=True)),
}.items():
    add(f"peaks, {name}", lambda x, run=run: run(peaks(x)), X)

# --- outputs whose elements share memory ---------------------------------------------------------

add("output unfolded", lambda x: (x * 2).unfold(-1, 2, 1), X)
add("output unfolded along the axis", lambda x: attended(x).unfold(1, 3, 1), X)
add("output expanded", lambda x: attended(x).mean(1, keepdim=True).expand(X), X)
add("output expanded and cut", lambda x: attended(x)[:, None].expand(2, 3, 7, 8)[:, 1:], X)
add("output of an input, unfolded", lambda x: (x.unfold(1, 3, 1), attended(x)), X)
add("output of an input, expanded", lambda x: (x.expand(3, *X), attended(x)), X)
add("output strided", lambda x: (x * 2).as_strided((3, 4), (2, 1)), X)

# --- inputs that share memory, and writes that an op hides ---------------------------------------


def zeros_twice(n: int = 3) -> tuple[Tensor, ...]:
    t = torch.zeros(7).double()
    return randn(*X), t, t[:n]


def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a.add_(1.0)
    return attended(x) + b.sum()


class Apart(nn.Module):
    """The arguments by name."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Any:
        return self.run(x, a, b)


SHARED = "a is written to, and b shares its memory"
add_model("inputs of one memory", lambda: Apart(added), zeros_twice, refusal=SHARED)
add_model(
    "inputs of one memory that do not meet",
    lambda: Apart(added),
    lambda: (lambda t: (randn(*X), t[:4], t[4:]))(torch.zeros(7).double()),
)


class Ahead(nn.Module):
    """A buffer that is a view of another one, which is counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("first", self.seen[:2])

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return attended(x) * self.first.sum()


add_model(
    "buffers of one memory",
    Ahead,
    lambda: (randn(*X),),
    refusal="seen is written to, and first shares its memory",
)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(attended(x).mT)


for name, norm in {
    "running": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "affine": lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True, momentum=0.3),
    "eval": lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True).eval(),
    "plain": lambda: nn.InstanceNorm1d(8, affine=True),
    "batch": lambda: nn.BatchNorm1d(8),
    "batch, cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "spectral": lambda: nn.utils.spectral_norm(nn.Linear(7, 5)),
    "spectral, parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(7, 5)),
    "weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)),
}.items():
    add_model(f"norm, {name}", lambda norm=norm: Normed(norm().double()), lambda: (randn(*X),))


class Kept(nn.Module):
    """A buffer that is written to in several ways, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("rows", torch.zeros(2, 7, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        y = attended(x)
        with torch.no_grad():
            torch.mean(y, (0, 1), out=self.kept)
            self.kept.mul_(2)
            self.rows[:, 2:] = y[:, 2:]
            self.rows[0].add_(1)
            self.rows.select(1, 1).copy_(y[:, 3])
        return y * self.kept, self.kept, self.rows


add_model("buffers written to", Kept, lambda: (randn(*X),))


def returned(x: Tensor, a: Tensor, b: Tensor) -> Any:
    a.add_(b)
    return attended(x) * a.sum(), a


add_model(
    "an input written to, and returned",
    lambda: Apart(returned),
    lambda: (randn(*X), torch.zeros(7).double(), torch.ones(7).double()),
)

# --- masks of integers that wrap -----------------------------------------------------------------


def wrapped_scores(x: Tensor) -> Tensor:
    i = torch.arange(7, dtype=torch.uint8)
    return (x @ x.mT).masked_fill(~(i[:, None] - i >= 0), -1e9).softmax(-1) @ x


def wrapped_mask(x: Tensor) -> Tensor:
    i = torch.arange(7, dtype=torch.int8)
    return sdpa(x, x, x, (i[:, None] + 125) >= (i + 125))


add("mask of uint8", wrapped_scores, X)
add("mask of int8", wrapped_mask, X)

# --- attention whose head dim is the axis --------------------------------------------------------


class CrossCovariance(nn.Module):
    """XCiT's: channels attend to channels, and the tokens are the head dim."""

    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.linspace(0.5, 1.5, heads).view(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        y = sdpa(q, k, v, scale=1.0) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(b, n, c))


class ClassAttention(nn.Module):
    """The first token attends to all."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.q, self.kv, self.heads = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), heads

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(x[:, :1]), self.kv(x).chunk(2, -1)
        y = sdpa(*(heads(t, self.heads) for t in (q, k, v)))
        return y.transpose(1, 2).flatten(2)


class XCiT(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.patches, self.cls = nn.Linear(5, 32), nn.Parameter(torch.randn(1, 1, 32))
        self.first, self.second = (CrossCovariance(32, 4, fused) for _ in range(2))
        self.norm, self.classes = nn.LayerNorm(32), ClassAttention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return x[:, :1] + self.classes(x)


for fused in (True, False):
    add_model(
        f"cross-covariance, {'fused' if fused else 'written out'}",
        lambda fused=fused: XCiT(fused).double(),
        lambda: (randn(2, 13, 5),),
    )
