"""Models that call the package flash_attn, of several versions, and what one rank does with them in
tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as utils
from flash_package import fourth, installed, interface, third
from model_jobs import gradients
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mosaic

N, BATCH, HEADS, DIM = 37, 2, 4, 8
TEXTS = [0, 11, 11, 29, N]
OPTIONS = {"softmax_scale": 0.3, "causal": True}


class Calls(nn.Module):
    """One layer of attention by ``call``; ``reads``: the log-sum-exp, too."""

    def __init__(self, call: str, reads: bool) -> None:
        super().__init__()
        self.call, self.reads = call, reads
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, DIM))
        found = CALLS[self.call](qkv, begins, self.reads)
        if self.reads:
            found = found[0] * torch.sigmoid(found[1].to(x.dtype).mT)[..., None]
        return x + found.flatten(-2)


def asking(reads: bool, name: str = "return_attn_probs") -> dict[str, Any]:
    return OPTIONS | ({name: True} if reads else {})


def plain(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    q, k, v = qkv.unbind(-3)
    return interface.flash_attn_func(q, k, v, window_size=(9, -1), **asking(reads))


def qkvpacked(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    return interface.flash_attn_qkvpacked_func(qkv, **asking(reads))


def kvpacked(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    q, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
    return interface.flash_attn_kvpacked_func(q, kv, **asking(reads))


def varlen_qkvpacked(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    return interface.flash_attn_varlen_qkvpacked_func(qkv, begins, N, **asking(reads))


def varlen_kvpacked(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    q, kv, at = qkv[:, 0], qkv[:, 1:], (begins, begins, N, N)
    return interface.flash_attn_varlen_kvpacked_func(q, kv, *at, **asking(reads))


def torch_varlen(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    """In one process by the package: torch has no kernel for CPUs."""
    q, k, v = qkv.unbind(-3)
    texts = (begins, begins, N, N)
    if not torch.compiler.is_compiling():
        return interface.flash_attn_varlen_func(q, k, v, *texts, **asking(reads))
    aux = varlen.AuxRequest(lse=True) if reads else None
    return varlen.varlen_attn(q, k, v, *texts, return_aux=aux, scale=0.3, window_size=(-1, 0))


def third_plain(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    return third.flash_attn_func(*qkv.unbind(-3), num_splits=1, **asking(reads))


def third_varlen(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    q, k, v = qkv.unbind(-3)
    return third.flash_attn_varlen_func(q, k, v, begins, begins, N, N, **asking(reads))


def fourth_plain(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    found = fourth.flash_attn_func(*qkv.unbind(-3), **asking(reads, "return_lse"))
    return found if reads else found[0]


def fourth_varlen(qkv: Tensor, begins: Tensor, reads: bool) -> Any:
    at = {"cu_seqlens_q": begins, "cu_seqlens_k": begins}
    found = fourth.flash_attn_varlen_func(*qkv.unbind(-3), **at, **asking(reads, "return_lse"))
    return found if reads else found[0]


OF_TEXTS = (varlen_qkvpacked, varlen_kvpacked, torch_varlen, third_varlen, fourth_varlen)
OF_BATCHES = (plain, qkvpacked, kvpacked, third_plain, fourth_plain)
CALLS = {f.__name__: f for f in (*OF_TEXTS, *OF_BATCHES)}


def calling(call: str, reads: bool = False) -> Any:
    model = Calls(call, reads).double()
    lead = () if CALLS[call] in OF_TEXTS else (BATCH,)
    x = torch.randn(*lead, N, HEADS * DIM).double().requires_grad_()
    return model, (x, torch.tensor(TEXTS, dtype=torch.int32)), {}


def numbers_of_texts(call: str, p: int) -> dict[str, Any]:
    """Ten batches of as many tokens in 1 to 19 texts, of one in which the last are empty: outputs
    and gradients, and how many programs are compiled for them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, (x, _), _ = calling(call)
    called = model
    if p > 1:
        mosaic.init(sp_size=p)
        spec = mosaic.ShardingSpec(inputs={"x": "tokens dim"}, axes={"tokens": "ring"})
        called = torch.compile(model, backend="mosaic", options={"spec": spec, "inner": "eager"})
    found = {}
    with installed(), mosaic.plans() as plans:
        for number in range(1, 21, 2):
            ends = torch.randperm(N - 1)[: number - 1].sort().values + 1
            begins = [0, *ends.tolist(), N] + [N] * (number == 7)
            out = called(x, torch.tensor(begins, dtype=torch.int32))
            out.square().sum().backward()
            found |= {f"{number} texts": out.detach(), f"{number}, gradient": x.grad}
            x.grad = None
    return {"found": {**found, **gradients(model)}, "programs": len(plans)}


@contextmanager
def known_to_transformers() -> Iterator[None]:
    """As if it had looked for the package, found it, and a GPU."""
    with installed(), ExitStack() as changes:
        found = mock.patch.object(utils, "is_flash_attn_2_available", pass_all)
        able = mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", pass_all)
        changes.enter_context(found)
        changes.enter_context(able)
        utils.lazy_import_flash_attention("flash_attention_2")
        yield


def pass_all(*args: Any, **kwargs: Any) -> bool:
    return True


def run_llama(kind: str, p: int) -> dict[str, Any]:
    """transformers' Llama with ``attn_implementation="flash_attention_2"``: two batches, packed
    texts with their cu_seqlens or told by position_ids alone, or padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, **sizes, **heads)
    batch = 1 if kind in ("texts", "positions") else BATCH
    ids = torch.randint(0, 64, (batch, N))
    given: dict[str, Any] = {"labels": ids, "use_cache": False}
    if batch == 1:
        given["position_ids"] = torch.arange(N)[None] % 19
    if kind == "texts":
        begins = torch.tensor([0, 19, N], dtype=torch.int32)
        given |= {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins}
        given |= {"max_length_q": 19, "max_length_k": 19}
    if kind == "padding":
        given["attention_mask"] = (torch.arange(N) < torch.tensor([[N], [29]])).long()
    with known_to_transformers(), mosaic.plans() as plans:
        way = {"attn_implementation": "flash_attention_2"}
        model: Any = LlamaForCausalLM._from_config(config, **way).double()
        called = model
        if p > 1:
            mosaic.init(sp_size=p)
            called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
        loss = called(ids, **given).loss
        loss.backward()
    masks = [(a.mask, a.method) for plan in plans for a in plan.attentions]
    found = {"loss": loss.detach(), "gradients": gradients(model)}
    return {**found, "masks": masks, "programs": len(plans)}
