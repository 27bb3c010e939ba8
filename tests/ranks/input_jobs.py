"""Models that attend by other calls than SDPA, and what one rank does with them in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from flash_package import installed, package
from model_jobs import gradients, run_model
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM
from walk import strips_of_masks

import mosaic

N, BATCH, HEADS, DIM, BLOCK = 37, 2, 4, 8, 16
INF = float("inf")


def causal(model: nn.Module, data: Tensor) -> Callable:
    return lambda b, h, i, j: i >= j


def window(model: nn.Module, data: Tensor) -> Callable:
    return lambda b, h, i, j: (i >= j) & (i - j < 9)


def documents(model: nn.Module, data: Tensor) -> Callable:
    return lambda b, h, i, j: (i >= j) & (data[b, i] == data[b, j])


def prefix(model: nn.Module, data: Tensor) -> Callable:
    """As long as the last document's number, which only the data says."""
    return lambda b, h, i, j: (i >= j) | (j < 3 * data[b, -1])


def dilated(model: nn.Module, data: Tensor) -> Callable:
    """By heads: every second key, or every third; some rows of padding see none."""
    return lambda b, h, i, j: ((i - j) % (2 + h % 2) == 0) & (data[b, i] > 0)


MASKS = {f.__name__: f for f in (causal, window, documents, prefix, dilated)}


def alibi(model: nn.Module) -> Callable:
    slopes = model.slopes
    return lambda score, b, h, i, j: score + slopes[h] * (j - i)


def relative(model: nn.Module) -> Callable:
    """A learned bias of heads and distances."""
    table = model.table
    return lambda score, b, h, i, j: score + table[h, (i - j).abs().clamp(max=15)]


def doubled(model: nn.Module) -> Callable:
    return lambda score, b, h, i, j: torch.where(i >= j, score * 2, -INF)


def capped(model: nn.Module) -> Callable:
    """As Gemma 2 does, with a learned bias behind it."""
    table = model.table
    return lambda score, b, h, i, j: (
        2 * torch.tanh(score / 2) + table[h, (i - j).abs().clamp(max=15)]
    )


SCORES = {f.__name__: f for f in (alibi, relative, doubled, capped)}


class Flex(nn.Module):
    """One layer of ``flex_attention``; ``makes_mask``: its BlockMask is made in forward."""

    def __init__(
        self, mask: str, scores: str, kv_heads: int, makes_mask: bool, reads_lse: bool = False
    ) -> None:
        super().__init__()
        self.mask, self.scores, self.makes_mask = mask, scores, makes_mask
        self.reads_lse = reads_lse
        self.kv_heads = kv_heads
        self.q = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.kv = nn.Linear(HEADS * DIM, 2 * kv_heads * DIM)
        self.table = nn.Parameter(torch.randn(HEADS, 16))
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def mask_of(self, data: Tensor) -> BlockMask:
        mod = MASKS[self.mask](self, data)
        return create_block_mask(mod, len(data), HEADS, N, N, device="cpu", BLOCK_SIZE=BLOCK)

    def forward(self, x: Tensor, data: Tensor, mask: BlockMask | None) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.kv_heads, DIM)).transpose(1, 2).chunk(2, 1)
        if self.makes_mask:
            mask = self.mask_of(data)
        mod = SCORES[self.scores](self) if self.scores else None
        gqa = self.kv_heads < HEADS
        aux = AuxRequest(lse=True)
        given = {"scale": 0.3, "enable_gqa": gqa, "return_aux": aux if self.reads_lse else None}
        out = flex_attention(q, k, v, mod, mask, **given)
        if self.reads_lse:
            out = out[0] * torch.sigmoid(out[1].lse)[..., None]
        return x + out.transpose(1, 2).flatten(2)


def flex(
    mask: str = "",
    scores: str = "",
    kv_heads: int = HEADS,
    makes_mask: bool = False,
    reads_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    rounds: bool = False,
) -> Any:
    """``rounds``: what goes in is what bfloat16 would hold of it."""
    model = Flex(mask, scores, kv_heads, makes_mask, reads_lse)
    model = (model.bfloat16() if rounds else model).to(dtype)
    data = torch.arange(N).expand(BATCH, N) // torch.tensor([[11], [7]])
    x = torch.randn(BATCH, N, HEADS * DIM).to(torch.bfloat16 if rounds else dtype).to(dtype)
    outside = model.mask_of(data) if mask and not makes_mask else None
    return model, (x.requires_grad_(), data, outside), {}


def other_documents(p: int) -> list[tuple[int, float]]:
    """How many programs there are after each of some BlockMasks, and how wrong it is."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (x, data, _), _ = flex(mask="documents")
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    found = []
    with torch.no_grad(), mosaic.plans() as plans:
        for n in (11, 5, 30):
            data = torch.arange(N).expand(BATCH, N) // n
            mask = model.mask_of(data)
            got, want = (f(x.detach(), data, mask) for f in (compiled, model))
            found.append((len(plans), (got - want).abs().max().item()))
    return found


class Stack(nn.Module):
    """Its blocks share one mask, which is made before them."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Flex(**given) for _ in range(2))

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        mask = self.blocks[0].mask_of(data)
        for block in self.blocks:
            x = block(x, data, mask)
        return x.square().mean()


def run_stack(p: int) -> dict:
    """Compiled block by block, on ShardedTensors."""
    torch.manual_seed(0)
    model = Stack(mask="documents", scores="relative", kv_heads=2, makes_mask=False).double()
    x, data = torch.randn(BATCH, N, HEADS * DIM).double(), torch.arange(N).expand(BATCH, N) // 9
    called: Any = model
    if p > 1:
        mosaic.init(sp_size=p)
        spec = mosaic.ShardingSpec(inputs={"x": "batch rows features"}, axes={"rows": "auto"})
        called = mosaic.parallelize(model, spec, inner="eager")
    with mock.patch.object(flex_module, "_validate_device", pass_all):
        loss = called(x, data)
        loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def flex_without_a_compiler() -> str:
    mosaic.init(sp_size=2)
    x = mosaic.distribute(torch.randn(1, 2, N, DIM), 2)
    with pytest.raises(mosaic.UnsupportedError) as error:
        flex_attention(x, x, x)
    return str(error.value)


def run_llama(p: int) -> dict:
    """transformers' Llama with grouped queries, of packed texts: by flex_attention on ranks, by
    SDPA in one process, as flex has no backward for CPUs there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, **sizes, **heads)
    way = "sdpa" if p == 1 else "flex_attention"
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation=way)
    ids, texts = torch.randint(0, 64, (BATCH, N)), torch.arange(N).expand(BATCH, N) % 19
    called = model
    if p > 1:
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    given = {"labels": ids, "position_ids": texts, "use_cache": False}
    with mock.patch.object(flex_module, "_validate_device", pass_all), mosaic.plans() as plans:
        loss = called(ids, **given).loss
        loss.backward()
    masks = {a.mask for plan in plans for a in plan.attentions}
    found = {"loss": loss.detach(), "gradients": gradients(model), "masks": masks}
    return {**found, "programs": len(plans)}


class Packed(nn.Module):
    """One layer of attention within texts that stand one behind the other, by one of its ``calls``;
    in one process always by those of the package."""

    def __init__(self, call: str, kv_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.call, self.kv_heads, self.window = call, kv_heads, window
        self.q = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.kv = nn.Linear(HEADS * DIM, 2 * kv_heads * DIM)

    def forward(
        self, x: Tensor, y: Tensor, begins: Tensor, key_begins: Tensor, longest: int
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM))
        k, v = self.kv(y).unflatten(-1, (2 * self.kv_heads, DIM)).chunk(2, -2)
        if self.call == "dense":
            out = package.flash_attn_func(q, k, v, 0.0, 0.3, True, (9, -1))
        elif self.call == "package" or not torch.compiler.is_compiling():
            given = {"softmax_scale": 0.3, "window_size": self.window}
            texts = (begins, key_begins, longest, longest)
            out = package.flash_attn_varlen_func(q, k, v, *texts, **given)
        else:
            given = {"scale": 0.3, "window_size": self.window}
            given |= {"enable_gqa": True} if self.kv_heads < HEADS else {}  # torch 2.11 has it not
            out = varlen_attn(q, k, v, begins, key_begins, longest, longest, **given)
        return x + out.flatten(-2)


#: Where texts begin, of queries and of longer keys; one is empty.
BEGINS, KEY_BEGINS = [0, 11, 11, 29, N], [0, 13, 17, 40, 51]


def packed(
    call: str, kv_heads: int = HEADS, window: tuple[int, int] = (-1, -1), crosses: bool = False
) -> Any:
    model = Packed(call, kv_heads, window).double()
    lead = (BATCH,) if call == "dense" else ()
    x = torch.randn(*lead, N, HEADS * DIM).double().requires_grad_()
    y = torch.randn(*lead, KEY_BEGINS[-1], HEADS * DIM).double() if crosses else x
    begins = torch.tensor(BEGINS, dtype=torch.int32)
    key_begins = torch.tensor(KEY_BEGINS, dtype=torch.int32) if crosses else begins
    return model, (x, y, begins, key_begins, 23), {}


def other_texts(call: str, p: int) -> list[tuple[int, float]]:
    """How many programs there are after each of some batches of texts, and how wrong it is."""
    mosaic.init(sp_size=p)
    torch.manual_seed(0)
    model, (x, _, begins, _, _), _ = packed(call, window=(-1, 0))
    compiled = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    found = []
    with installed(), mosaic.plans() as plans:
        for n in (23, 18, 12, 30):
            begins = torch.tensor([0, 5, 5, n, N], dtype=torch.int32)
            got, want = (f(x, x, begins, begins, n) for f in (compiled, model))
            found.append((len(plans), (got - want).abs().max().item()))
    return found


def pass_all(*tensors: Tensor) -> None:
    pass


def run_input(build: Callable[[], Any], options: dict | None, p: int = 1) -> dict:
    """As ``run_model``; flex's refusal to learn on the CPU is that of its kernels for CPUs. With
    what its partitioned program makes for all keys, and what the plan says of them."""
    on_cpu = mock.patch.object(flex_module, "_validate_device", pass_all)
    with on_cpu, installed(), mosaic.plans() as plans:
        found = run_model(build, options, p)
    masks = [a.mask for plan in plans for a in plan.attentions]
    strips = [x for x in strips_of_masks(plans, N, p) if x.startswith("local")]
    return {**found, "strips": strips, "masks": masks}
