"""Layers without attention, by the functions that transformers' models call, and what one rank does
with them in tests.

The library computes in float32 whatever it is given. So that a comparison shows what is wrong, and
not what is rounded, its functions are taken in float64 here: their own source, with other dtypes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from model_jobs import gradients
from torch import Tensor, nn
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import mosaic

FUNCTIONS = {
    qwen: ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "l2norm"),
    kimi: ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "l2norm"),
    mamba2: ("mamba2_chunk_scan",),
    mamba: ("mamba_selective_scan",),
}


def exact(module: ModuleType, name: str) -> Callable[..., Any]:
    """The library's function in float64."""
    source = inspect.getsource(inspect.unwrap(getattr(module, name)))
    source = re.sub(r"^@.*\n", "", source, flags=re.M)
    source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    names = dict(vars(module))
    exec(compile(source, module.__file__ or name, "exec"), names)
    found: Callable[..., Any] = names[name]
    return found


@contextmanager
def in_float64() -> Iterator[None]:
    patches = [mock.patch.object(m, name, exact(m, name)) for m, ns in FUNCTIONS.items() for name in ns]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@dataclass(frozen=True)
class Case:
    """``call``: which function; ``first``: from a state that is given; ``last``: the last one is
    read."""

    call: str
    first: bool = False
    last: bool = False
    n: int = 37
    dtype: torch.dtype = torch.float64


BATCH, K_HEADS, HEADS, K_DIM, V_DIM, CHUNK = 2, 2, 4, 6, 5, 8


class Layer(nn.Module):
    """Projections of x to what a recurrence takes, and the recurrence."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.mix: Callable[..., Any] = CALLS[case.call]
        self.project = nn.Linear(8, 200)
        self.rates = nn.Parameter(torch.rand(HEADS))
        self.skips = nn.Parameter(torch.rand(HEADS))
        self.norm = nn.Linear(HEADS * V_DIM, 8)

    def forward(self, x: Tensor, first: Tensor | None) -> Any:
        out, last = self.mix(self, self.project(x), first)
        out = x + self.norm(out.to(x.dtype))
        return (out, last) if self.case.last else out


def split(x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Features as tensors of these shapes for each token."""
    parts = x.split([torch.Size(s).numel() for s in shapes] + [x.shape[-1] - sum(torch.Size(s).numel() for s in shapes)], -1)
    return [part.unflatten(-1, s) for part, s in zip(parts, shapes, strict=False)]


def delta(name: str, module: ModuleType, **options: Any) -> Callable[..., Any]:
    """The gated delta rule; Kimi's has a decay for each row of the state, and no grouped heads."""

    def mix(layer: Layer, x: Tensor, first: Tensor | None) -> Any:
        heads = HEADS if module is kimi else K_HEADS
        decay = (HEADS, K_DIM) if module is kimi else (HEADS,)
        q, k, v, g, beta = split(x, (heads, K_DIM), (heads, K_DIM), (HEADS, V_DIM), decay, (HEADS,))
        rates = layer.rates[:, None] if module is kimi else layer.rates
        out, last = getattr(module, name)(
            q, k, v, g=-nn.functional.softplus(g) * rates, beta=beta.sigmoid(),
            initial_state=first, output_final_state=layer.case.last, **options,
        )  # fmt: skip
        return out.flatten(-2), last

    return mix


def by_heads(layer: Layer, x: Tensor, first: Tensor | None) -> Any:
    """Mamba 2."""
    u, dt, b, c = split(x, (HEADS, V_DIM), (HEADS,), (2, K_DIM), (2, K_DIM))
    found = mamba2.mamba2_chunk_scan(
        u, dt, -layer.rates, b, c, chunk_size=CHUNK, D=layer.skips, dt_bias=layer.rates,
        initial_states=first, dt_softplus=True, dt_limit=(0.05, 2.0),
        return_final_states=layer.case.last,
    )  # fmt: skip
    out, last = found if layer.case.last else (found, None)
    return out.flatten(-2), last


def by_channels(layer: Layer, x: Tensor, first: Tensor | None) -> Any:
    """Mamba: (batch, channels, rows)."""
    channels = HEADS * V_DIM
    u, dt, z, b, c = (t.mT for t in split(x, (channels,), (channels,), (channels,), (K_DIM,), (K_DIM,)))
    rates = layer.rates.repeat_interleave(V_DIM)
    found = mamba.mamba_selective_scan(
        u, dt, -rates[:, None].expand(-1, K_DIM), b, c, D=rates, z=z, delta_bias=rates,
        delta_softplus=True, return_last_state=layer.case.last,
    )  # fmt: skip
    out, last = found if layer.case.last else (found, None)
    return out.mT, last


CALLS: dict[str, Callable[..., Any]] = {
    "chunk": delta("torch_chunk_gated_delta_rule", qwen, chunk_size=CHUNK, use_qk_l2norm_in_kernel=True),
    "without l2norm": delta("torch_chunk_gated_delta_rule", qwen, chunk_size=CHUNK),
    "recurrent": delta("torch_recurrent_gated_delta_rule", qwen, use_qk_l2norm_in_kernel=True),
    "kimi": delta("chunk_kimi_delta_attention", kimi, chunk_size=CHUNK, use_qk_l2norm_in_kernel=True),
    "kimi recurrent": delta("recurrent_kimi_delta_attention", kimi),
    "mamba2": by_heads,
    "mamba": by_channels,
}


def run_layer(case: Case, p: int, dim: int = 1) -> dict[str, Any]:
    """Loss, results and gradients of a layer; with p > 0 through Mosaic, ``dim`` of x cut."""
    torch.manual_seed(0)
    with in_float64():
        layer = Layer(case).to(case.dtype)
        x = torch.randn(BATCH, case.n, 8, dtype=case.dtype, requires_grad=True)
        shape = (V_DIM, K_DIM) if case.call == "mamba2" else (K_DIM, V_DIM)
        first = torch.randn(BATCH, HEADS, *shape, dtype=torch.float64, requires_grad=True)
        first = first if case.first else None
        called: Callable[..., Any] = layer
        if p:
            mosaic.init(sp_size=p)
            spec = mosaic.ShardingSpec(
                inputs={"x": ["rows _ _", "_ rows _"][dim]}, axes={"rows": "ring"}
            )
            called = torch.compile(layer, backend="mosaic", options={"spec": spec, "inner": "eager"})
        with mosaic.plans() as plans:
            results = called(x, first)
            results = results if case.last else (results,)
            sum(r.double().square().sum() for r in results).backward()
    inputs = {"x": x.grad, **({"first": first.grad} if first is not None else {})}
    return {
        "results": [r.detach() for r in results],
        "gradients": {**gradients(layer), **inputs},
        "gathered": [g for plan in plans for g in plan.gathered],
        "sent": {
            c.why: c.bytes for plan in plans for c in plan.collectives if c.op == "all_gather"
        },
    }
