"""Packed texts through a causal convolution and a recurrence, as transformers' models call both,
and what one rank does with them in tests. They are compared with every text by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from model_jobs import gradients
from recurrence_jobs import CHUNK, COMMON, HYBRID, exact, said, split
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import BambaConfig, BambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.integrations import use_kernel_func_from_hub_with_fallback
from transformers.models.bamba import modeling_bamba as bamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import mosaic

#: What the library calls these functions in the packages that replace them.
PACKAGES = {
    "torch_chunk_gated_delta_rule": ("chunk_gated_delta_rule", "fla"),
    "chunk_kimi_delta_attention": ("chunk_kda", "fla"),
    "mamba2_chunk_scan": ("mamba_chunk_scan_combined", "mamba_ssm"),
    "causal_conv1d_fn": ("causal_conv1d_fn", "causal_conv1d"),
    "mamba2_split_conv1d_scan_combined": ("mamba_split_conv1d_scan_combined", "mamba_ssm"),
}
HAVE = {
    qwen: ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"),
    kimi: ("chunk_kimi_delta_attention", "causal_conv1d_fn"),
    bamba: ("mamba2_chunk_scan", "causal_conv1d_fn", "mamba2_split_conv1d_scan_combined"),
}
HEADS, K_DIM, V_DIM, WIDTH, FEATURES = 4, 6, 5, 4, 92


@contextmanager
def in_float64(packaged: bool) -> Iterator[None]:
    """The library's functions in float64, behind its own wrapper, with or without the packages."""
    with ExitStack() as stack:
        for module, names in HAVE.items():
            for name in names:
                plain = exact(module, name)
                stack.enter_context(mock.patch.object(module, name, wrapped(plain, packaged)))
        yield


def wrapped(plain: Callable[..., Any], packaged: bool) -> Callable[..., Any]:
    name, package = PACKAGES[plain.__name__]
    if not packaged:
        return use_kernel_func_from_hub_with_fallback(name, "no_such_package")(plain)
    module = ModuleType(package)
    setattr(module, name, torch.compiler.disable(STAND_INS[plain.__name__](plain)))
    with mock.patch.dict("sys.modules", {package: module}):
        return use_kernel_func_from_hub_with_fallback(name, package, "")(plain)


# --- stand-ins for packages: as these are told of texts, and as they take them apart -------------


def of_fla(plain: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None, **kwargs,
    ):  # fmt: skip
        assert not isinstance(q, FakeTensor), "kernels need memory"
        rest = (True, use_qk_l2norm_in_kernel)
        if cu_seqlens is None:
            return plain(q, k, v, g, beta, CHUNK, initial_state, *rest)
        edges = cu_seqlens.tolist()
        assert len(q) == 1
        assert initial_state is None or len(initial_state) == len(edges) - 1
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(edges)):
            first = None if initial_state is None else initial_state[i : i + 1]
            part = (x[:, start:stop] for x in (q, k, v, g, beta))
            out, state = plain(*part, CHUNK, first, *rest)
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)

    return kernel


def of_mamba(plain: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
        seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
        return_final_states=False,
    ):  # fmt: skip
        assert not isinstance(x, FakeTensor), "kernels need memory"
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        call = partial(plain, chunk_size=chunk_size, **options, return_final_states=True)
        if seq_idx is None:
            found = call(x, dt, A, B, C, initial_states=initial_states)
        else:
            assert seq_idx.dtype == torch.int32 and initial_states is None
            rows = [alone(call, A, *row) for row in zip(seq_idx, x, dt, B, C, strict=True)]
            found = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        return found if return_final_states else found[0]

    return kernel


def alone(call: Callable[..., Any], a: Tensor, texts: Tensor, *given: Tensor) -> Any:
    """One row of a batch, text by text: what it gives, and the state of the last."""
    sizes = torch.unique_consecutive(texts, return_counts=True)[1].tolist()
    outs, state = [], None
    for x, dt, b, c in zip(*(t[None].split(sizes, 1) for t in given), strict=True):
        out, state = call(x, dt, a, b, c)
        outs.append(out)
    return torch.cat(outs, 1), state


def known(plain: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(x, weight, bias=None, seq_idx=None, activation=None, **kwargs):
        raise AssertionError("what it does is written out, and it is not called")

    return kernel


STAND_INS = {
    "torch_chunk_gated_delta_rule": of_fla,
    "chunk_kimi_delta_attention": of_fla,
    "mamba2_chunk_scan": of_mamba,
    "causal_conv1d_fn": known,
    "mamba2_split_conv1d_scan_combined": known,
}


# --- a layer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``lengths``: of the texts in each row of the batch."""

    call: str
    lengths: tuple[tuple[int, ...], ...]
    packaged: bool = False
    dtype: torch.dtype = torch.float64


class Mixer(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call
        self.project = nn.Linear(8, FEATURES)
        self.weight = nn.Parameter(torch.randn(FEATURES, WIDTH))
        self.bias = nn.Parameter(torch.randn(FEATURES))
        self.rates = nn.Parameter(torch.rand(HEADS))
        self.down = nn.Linear(HEADS * V_DIM, 8)

    def forward(self, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        module = {"delta": qwen, "kimi": kimi, "mamba2": bamba}[self.call]
        features = module.causal_conv1d_fn(
            self.project(x).mT, self.weight, self.bias, activation="silu", seq_idx=seq_idx
        ).mT
        if self.call == "mamba2":
            u, dt, b, c = split(features, (HEADS, V_DIM), (HEADS,), (2, K_DIM), (2, K_DIM))
            out = bamba.mamba2_chunk_scan(
                u, dt, -self.rates, b, c, chunk_size=CHUNK, D=self.rates, dt_bias=self.rates,
                dt_softplus=True, seq_idx=seq_idx,
            )  # fmt: skip
        else:
            heads = 2 if self.call == "delta" else HEADS
            decay = (HEADS,) if self.call == "delta" else (HEADS, K_DIM)
            sizes = (heads, K_DIM), (heads, K_DIM), (HEADS, V_DIM), decay, (HEADS,)
            rule = "chunk_kimi_delta_attention" if self.call == "kimi" else PLAIN
            q, k, v, g, beta = split(torch.cat([features] * 2, -1), *sizes)
            rates = self.rates.view(-1, *[1] * (len(decay) - 1))
            out, _ = getattr(module, rule)(
                q, k, v, g=-nn.functional.softplus(g) * rates, beta=beta.sigmoid(),
                use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        return x + self.down(out.flatten(-2).to(x.dtype))


PLAIN = "torch_chunk_gated_delta_rule"


def run_texts(case: Case, p: int) -> dict[str, Any]:
    """The result and gradients; with p > 0 of all texts through Mosaic, else of each by itself."""
    torch.manual_seed(0)
    plans: list[mosaic.Plan] = []
    with in_float64(case.packaged and p > 0):
        layer = Mixer(case.call).to(case.dtype)
        x = given_of(case)
        if p:
            mosaic.init(sp_size=p)
            spec = mosaic.ShardingSpec(inputs={"x": "_ rows _"}, axes={"rows": "ring"})
            options = {"spec": spec, "inner": "eager"}
            with mosaic.plans() as plans:
                out = torch.compile(layer, backend="mosaic", options=options)(x, *told(case))
        else:
            rows = [row.split(sizes) for row, sizes in zip(x, case.lengths, strict=True)]
            parts = [[layer(t[None], None, None) for t in row] for row in rows]
            out = torch.cat([torch.cat(row, 1) for row in parts])
        out.square().sum().backward()
    return {
        "result": out.detach(),
        "gradients": {**gradients(layer), "x": x.grad},
        **said(plans),
    }


def given_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (len(case.lengths), sum(case.lengths[0]), 8)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x.to(case.dtype).requires_grad_()


def told(case: Case) -> tuple[Tensor, Tensor | None]:
    """seq_idx and cu_seqlens."""
    counts = [torch.tensor(row) for row in case.lengths]
    seq_idx = torch.stack([torch.arange(len(n)).repeat_interleave(n) for n in counts]).int()
    if case.call == "mamba2":
        return seq_idx, None
    (count,) = counts
    return seq_idx, nn.functional.pad(count.cumsum(0), (1, 0)).int()


def run_many(cases: Sequence[Case], buckets: tuple[int, ...] | None, p: int) -> dict[str, Any]:
    """The same layer on other texts, in all padded to the lengths of ``buckets``."""
    torch.manual_seed(0)
    steps = []
    with in_float64(packaged=False):
        layer = Mixer(cases[0].call).double()
        mosaic.init(sp_size=p)
        inputs = {"x": "_ rows _", "seq_idx": "_ rows"}
        spec = mosaic.ShardingSpec(inputs=inputs, axes={"rows": "ring"}, buckets=buckets)
        options = {"spec": spec, "inner": "eager"}
        called = torch.compile(layer, backend="mosaic", options=options)
        with mosaic.plans() as plans:
            for case in cases:
                x = given_of(case)
                layer.zero_grad()
                out = called(x, *told(case))
                out.square().sum().backward()
                steps.append(
                    {"result": out.detach(), "gradients": {**gradients(layer), "x": x.grad}}
                )
    return {"steps": steps, **said(plans)}


# --- models -------------------------------------------------------------------------------------


def qwen3_next() -> Any:
    return Qwen3NextForCausalLM(Qwen3NextConfig(**COMMON, **HYBRID))


def hybrid_mamba() -> Any:
    sizes = {
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2,
        "mamba_chunk_size": CHUNK, "attn_layer_indices": [1], "mamba_expand": 2,
    }  # fmt: skip
    return BambaForCausalLM(BambaConfig(**COMMON, **sizes))


MODELS: dict[str, Callable[[], Any]] = {"qwen3_next": qwen3_next, "bamba": hybrid_mamba}
LENGTHS = (11, 3, 16, 7)


def run_packed(p: int, name: str, packaged: bool = False) -> dict[str, Any]:
    """Loss and gradients of a model on packed texts, as a collator of transformers packs them."""
    torch.manual_seed(0)
    ids = [torch.randint(3, 64, (1, n)) for n in LENGTHS]
    labels = [x.clone().index_fill_(1, torch.tensor([0]), -100) for x in ids]
    plans: list[mosaic.Plan] = []
    with in_float64(packaged and p > 0):
        model = MODELS[name]().double()
        model.config.use_cache = False
        if p:
            mosaic.init(sp_size=p)
            called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
            with mosaic.plans() as plans:
                loss = called(torch.cat(ids, 1), labels=torch.cat(labels, 1), **packing()).loss
        else:
            counts = [n - 1 for n in LENGTHS]
            losses = [model(x, labels=y).loss for x, y in zip(ids, labels, strict=True)]
            loss = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
        loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model), **said(plans)}


def packing() -> dict[str, Any]:
    counts = torch.tensor(LENGTHS)
    edges = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return {
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "seq_idx": torch.arange(len(counts)).repeat_interleave(counts)[None].int(),
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
