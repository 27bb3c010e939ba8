"""Steps of transformers' Llama, with the width of the 8B one, on all ranks: FSDP2, checkpoints.

A step is forward and backward. By ``mosaic.parallelize``, and as torchtitan does it: blocks in
checkpoints, compiled, then FSDP2, under ``context_parallel``; the loss is compiled, with logits.
Both are given the same model and the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torch_context_parallel as theirs
from bench_step import SMALL, Size, profiled
from case_runner import CUDA, Case, Row, Setting
from check_methods import one_gpu
from exposed import with_profile
from rank_attention import Attention, between, mark, slowest, timed
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import mosaic

POLICY = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
INNER = "inductor" if CUDA else "eager"
MODE = theirs.Mode("cuDNN", "allgather")
SPEC = mosaic.ShardingSpec(
    inputs=dict.fromkeys(("input_ids", "labels"), "batch tokens"), axes={"tokens": "auto"}
)
Step = Callable[[], Tensor]


def sizes(setting: Setting) -> tuple[Size, int, int]:
    """The model's, its words, and all tokens."""
    p = setting.here.size()
    return (SMALL, 128, 64 * p) if setting.small else (Size(), 128_256, 32_768 * p)


def llama(setting: Setting, attention: str) -> tuple[Any, Tensor]:
    """The same model, and the same tokens, on every rank."""
    size, words, tokens = sizes(setting)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=words,
        max_position_embeddings=tokens,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with setting.here.device:
        return LlamaForCausalLM(config).train(), torch.randint(words, (1, tokens))


def by_mosaic(setting: Setting) -> Iterator[Row]:
    model, ids = llama(setting, "sdpa")
    mosaic.parallelize(model, SPEC, fully_shard={"mp_policy": POLICY}, checkpoint=True, inner=INNER)

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    took = measured(step, setting)
    if CUDA:
        size, _, tokens = sizes(setting)
        less = Attention(tokens).of_one_rank(setting.here.size())
        attention = timed(one_gpu, less.tensors(setting.here.device))["both ms"]
        gemm = profiled(step)["GEMM"]
        ideal = gemm + size.layers * attention
        took |= {"GEMM ms": gemm, "ideal ms": ideal, "of ideal": ideal / took["step ms"]}
    yield from with_profile(Row(case(setting), "mosaic.parallelize", took), step, setting)


def case(setting: Setting) -> str:
    size, _, tokens = sizes(setting)
    return f"Llama, {size.layers} layers, {tokens:,} tokens"


def measured(step: Step, setting: Setting) -> dict[str, float]:
    begin = mark()
    loss = step()
    (first,) = between([begin, mark()])
    step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(5 if CUDA else 1):
        begin = mark()
        step()
        found += between([begin, mark()])
    (took,) = slowest([median(found)])
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan
    rate = 1e3 * sizes(setting)[2] / setting.here.size() / took
    worst = slowest([peak])[0]
    return {"step ms": took, "tokens/s/GPU": rate, "GiB": worst, "first s": first / 1e3,
            "loss": float(loss)}  # fmt: skip


# --- torch ----------------------------------------------------------------------------------------


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> Any:
    return theirs.causal(q, k, v).transpose(1, 2).contiguous(), None


def by_torch(setting: Setting, outside: bool) -> Iterator[Row]:
    """``outside``: attention is left out of the compiled blocks."""
    if not CUDA:
        return  # context_parallel has no kernel for CPUs
    call = torch.compiler.disable(attend) if outside else attend
    AttentionInterface.register("causal", call)  # a name without masks
    model, ids = llama(setting, "causal")
    layers = model.model.layers
    for number, layer in enumerate(layers):
        wrapped = checkpoint_wrapper(layer, preserve_rng_state=False)
        layers[number] = torch.compile(wrapped, backend=INNER, dynamic=False)
        fully_shard(layers[number], mp_policy=POLICY)
    fully_shard(model, mp_policy=POLICY)
    mesh = setting.here.mesh
    assert mesh is not None
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    loss_of = torch.compile(next_words, backend=INNER, dynamic=False)

    def step() -> Tensor:
        logits = model(input_ids=ids, position_ids=positions).logits
        loss = loss_of(logits, labels, ids.shape[1] * mesh.size())
        loss.backward()
        model.zero_grad()
        return loss.detach()

    with ExitStack() as stack:
        stack.enter_context(theirs.rotating(MODE.way, mesh["sp"], [ids, labels, positions], 1))
        stack.enter_context(sdpa_kernel(theirs.KERNELS[MODE.kernel]))
        took = measured(step, setting)
        took["loss"] = sum_of(took["loss"])
        where = ", attention not compiled" if outside else ""
        row = Row(case(setting), f"{MODE} + FSDP2 + compile{where}", took)
        yield from with_profile(row, step, setting)


def sum_of(loss: float) -> float:
    found = torch.tensor(loss, device="cuda" if CUDA else "cpu")
    torch.distributed.all_reduce(found)
    return float(found)


def next_words(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """This rank's share of the mean over all tokens."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return losses / (count - 1)


def cases(p: int) -> list[Case]:
    return [
        Case("Llama: mosaic", by_mosaic, 150),
        Case("Llama: torch", partial(by_torch, outside=False), 100),
        Case("Llama: torch, attention not compiled", partial(by_torch, outside=True), 80),
    ]
