"""Layers without attention, by the functions that transformers' models call, and what one rank does
with them in tests.

The library computes in float32 whatever it is given. So that a comparison shows what is wrong, and
not what is rounded, its functions are taken in float64 here: their own source, with other dtypes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any
from unittest import mock

import parallel_jobs
import torch
from model_jobs import gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel
from transformers.integrations import use_kernel_func_from_hub_with_fallback
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import mosaic

FUNCTIONS = {
    qwen: ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    kimi: ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
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
def in_float64(packaged: bool = False) -> Iterator[None]:
    """``packaged``: Qwen's chunks are a package's, with kernels that Dynamo cannot look into."""
    with ExitStack() as stack:
        for module, names in FUNCTIONS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, exact(module, name)))
        if packaged:
            stack.enter_context(mock.patch.object(qwen, "torch_chunk_gated_delta_rule", of_fla()))
        yield


def of_fla() -> Callable[..., Any]:
    """Qwen's function where the package fla is installed, whose arguments have other names."""
    plain = qwen.torch_chunk_gated_delta_rule

    @torch.compiler.disable
    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False,
    ):  # fmt: skip
        assert not isinstance(q, FakeTensor), "kernels need memory"
        states = (initial_state, output_final_state)
        return plain(q, k, v, g, beta, CHUNK, *states, use_qk_l2norm_in_kernel)

    package = ModuleType("fla")
    package.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    with mock.patch.dict("sys.modules", {"fla": package}):
        return use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(plain)


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
    sizes = [prod(shape) for shape in shapes]
    parts = x[..., : sum(sizes)].split(sizes, -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


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
    sizes = (channels,), (channels,), (channels,), (K_DIM,), (K_DIM,)
    u, dt, z, b, c = (t.mT for t in split(x, *sizes))
    rates = layer.rates.repeat_interleave(V_DIM)
    found = mamba.mamba_selective_scan(
        u, dt, -rates[:, None].expand(-1, K_DIM), b, c, D=rates, z=z, delta_bias=rates,
        delta_softplus=True, return_last_state=layer.case.last,
    )  # fmt: skip
    out, last = found if layer.case.last else (found, None)
    return out.mT, last


chunked = partial(delta, chunk_size=CHUNK)
CALLS: dict[str, Callable[..., Any]] = {
    "chunk": chunked("torch_chunk_gated_delta_rule", qwen, use_qk_l2norm_in_kernel=True),
    "without l2norm": chunked("torch_chunk_gated_delta_rule", qwen),
    "package": delta("torch_chunk_gated_delta_rule", qwen, use_qk_l2norm_in_kernel=True),
    "recurrent": delta("torch_recurrent_gated_delta_rule", qwen, use_qk_l2norm_in_kernel=True),
    "kimi": chunked("chunk_kimi_delta_attention", kimi, use_qk_l2norm_in_kernel=True),
    "kimi recurrent": delta("recurrent_kimi_delta_attention", kimi),
    "mamba2": by_heads,
    "mamba": by_channels,
}


def run_layer(case: Case, p: int) -> dict[str, Any]:
    """Results and gradients of a layer; with p > 0 through Mosaic."""
    torch.manual_seed(0)
    with in_float64(packaged=case.call == "package"):
        layer = Layer(case).to(case.dtype)
        x = torch.randn(BATCH, case.n, 8, dtype=case.dtype, requires_grad=True)
        shape = (V_DIM, K_DIM) if case.call == "mamba2" else (K_DIM, V_DIM)
        first = torch.randn(BATCH, HEADS, *shape, dtype=torch.float64, requires_grad=True)
        given = (x, first if case.first else None)
        called: Callable[..., Any] = layer
        if p:
            mosaic.init(sp_size=p)
            spec = mosaic.ShardingSpec(inputs={"x": "_ rows _"}, axes={"rows": "ring"})
            options = {"spec": spec, "inner": "eager"}
            called = torch.compile(layer, backend="mosaic", options=options)
        with mosaic.plans() as plans:
            results = called(*given)
            results = results if case.last else (results,)
            sum(r.double().square().sum() for r in results).backward()
    inputs = {"x": x.grad, **({"first": first.grad} if case.first else {})}
    return {
        "results": [r.detach() for r in results],
        "gradients": {**gradients(layer), **inputs},
        **said(plans),
    }


def said(plans: list[mosaic.Plan]) -> dict[str, Any]:
    """How many graphs there were, what was gathered, and the bytes of all states."""
    states = [c for plan in plans for c in plan.collectives if "states" in c.why]
    return {
        "graphs": len(plans),
        "gathered": [line for plan in plans for line in plan.gathered],
        "states": [c.bytes for c in states],
    }


# --- models -------------------------------------------------------------------------------------

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HYBRID = {
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    "mlp_only_layers": [0, 1],
}  # fmt: skip


def texts(model: PreTrainedModel, n: int, padding: int) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    """Two texts, the first with padding in front."""
    ids = torch.randint(3, 64, (2, n))
    mask = torch.ones(2, n, dtype=torch.long)
    mask[0, :padding] = 0
    given = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    model.config.use_cache = False
    return model, (), {**given, **({"attention_mask": mask} if padding else {})}


def qwen3_next(n: int, padding: int = 0) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**COMMON, **HYBRID))
    return texts(model, n, padding)


def pure_mamba2(n: int) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    return texts(Mamba2ForCausalLM(Mamba2Config(**COMMON, **sizes)), n, 0)


MODELS: dict[str, Callable[..., Any]] = {
    "qwen3_next": qwen3_next,
    "qwen3_next, padding": partial(qwen3_next, padding=5),
    "mamba2": pure_mamba2,
}


def run_library(p: int, name: str, how: str, n: int = 37) -> dict[str, Any]:
    """Loss and gradients of a model; ``how``: as ``parallel_jobs.library`` says, or "found", where
    Mosaic finds the axis of whole inputs."""
    with in_float64(), mock.patch.dict(parallel_jobs.LIBRARY, MODELS):
        if how != "found":
            return parallel_jobs.library(p, name, how=how, n=n)
        torch.manual_seed(0)
        model, _, given = MODELS[name](n=n)
        model = model.double()
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
        with mosaic.plans() as plans:
            loss = called(**given).loss
            loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model), **said(plans)}
