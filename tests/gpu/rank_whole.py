"""Llama-3-8B whole, random weights, on all ranks: seconds and memory of a step, as long as it fits.

The model is made without memory and parallelized: FSDP2, checkpoints, loss without logits. Then
each rank draws its own part of the weights. A step is forward, backward and AdamW; weights and
moments are float32, what is computed bfloat16. Of the ``WAYS`` the first is taken that fits by the
plan's count, which stands beside what the GPU shows. The plan is made of 2 and of 4 layers: what
the others hold is as much again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "examples")]

import torch  # noqa: E402
from case_runner import CUDA, Case, Row, Setting  # noqa: E402
from exposed import finish, profiled  # noqa: E402
from rank_attention import slowest  # noqa: E402
from rank_llama import INNER, POLICY  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from train_llama_fsdp import SIZES  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import mosaic  # noqa: E402
from mosaic.layout import Layout  # noqa: E402

NAMES = dict.fromkeys(("input_ids", "labels"), "batch tokens")
GIB = 2**30
#: Layers of the models of which the plan is made.
FEW, MORE = 2, 4
#: FLOP per second of one GPU, roughly: whether there is time for a step.
RATE = 500e12


@dataclass(frozen=True)
class Way:
    """``offload``: what blocks keep for backward goes to the CPU."""

    method: str
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.method}, checkpoints" + ", kept on the CPU" * self.offload

    @property
    def spec(self) -> mosaic.ShardingSpec:
        return mosaic.ShardingSpec(NAMES, {"tokens": self.method}, outputs="shards")


#: Ulysses keeps what it has received; a ring keeps nothing of others.
WAYS = (Way("auto"), Way("ring"), Way("ring", offload=True))


def room(setting: Setting) -> float:
    """Bytes that a step may hold: on a GPU, beside what kernels and NCCL need for themselves."""
    if CUDA:
        return 0.9 * torch.cuda.get_device_properties(setting.here.device).total_memory
    return 5 * 2**20 / setting.here.size()  # on CPUs the plan's count stands for memory


def lengths(p: int, small: bool) -> list[int]:
    """The issue's, as far as so many GPUs may have room."""
    if small:
        return [128, 512]
    return [n for n in (131_072, 524_288, 1_048_576) if n <= 131_072 * p]


# --- the model ------------------------------------------------------------------------------------


def llama(setting: Setting, tokens: int, layers: int | None = None) -> Any:
    sizes = SIZES["tiny" if setting.small else "8b"]
    sizes = sizes | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=tokens, use_cache=False)
    return LlamaForCausalLM(config).train()


def trained(setting: Setting, tokens: int, way: Way) -> Any:
    """The model, cut, with weights of which each rank draws its own part."""
    with torch.device("meta"):
        model = llama(setting, tokens)
    sharded: Any = {"mp_policy": POLICY} if CUDA else True
    mosaic.parallelize(model, way.spec, fully_shard=sharded, checkpoint=True, inner=INNER)
    device = setting.here.device
    model.to_empty(device=device)
    with device:  # its buffers are empty
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    torch.manual_seed(setting.here.rank())
    with torch.no_grad():
        for weight in model.parameters():
            part = weight.to_local() if isinstance(weight, DTensor) else weight
            part.normal_(std=0.02) if part.ndim > 1 else part.fill_(1.0)
    return model


class OnCpu(torch.autograd.graph.save_on_cpu):
    """What blocks keep for backward goes to the CPU. Weights do not: FSDP2 frees them by itself.
    Nor does the little between blocks: of a ShardedTensor torch would copy the whole."""

    def __init__(self) -> None:
        super().__init__(pin_memory=CUDA)
        send, bring = self.pack_hook, self.unpack_hook
        stays = (nn.Parameter, mosaic.ShardedTensor)
        self.pack_hook = lambda x: x if isinstance(x, stays) else send(x)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else bring(kept)


def stepping(model: Any, ids: Tensor, way: Way) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)

    def step() -> Tensor:
        with OnCpu() if way.offload else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# --- its plan -------------------------------------------------------------------------------------


def counted(setting: Setting, ids: Tensor, method: str) -> dict[bool, float]:
    """Bytes at most in a step, of the rank that has most; by whether blocks keep theirs on the
    CPU, but for one."""
    found, p = {}, setting.here.size()
    for layers in (FEW, MORE):
        with setting.here.device:
            model = llama(setting, ids.shape[1], layers).to(torch.bfloat16 if CUDA else None)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        given = {"input_ids": ids, "labels": ids}
        shares = replace(Way(method).spec, gradients="shares")  # FSDP2 adds them up
        plan = mosaic.explain(model, **given, spec=shares)
        found[layers] = plan.memory(shards=p, dtype=torch.float32)
        del model
    few, more = found[FEW], found[MORE]
    count = SIZES["tiny" if setting.small else "8b"]["num_hidden_layers"]
    peak = few.peak + (count - FEW) * (more.peak - few.peak) / (MORE - FEW)
    kept = (more.activations - few.activations) / (MORE - FEW)
    most = slowest([peak, peak - (count - 1) * kept])
    return dict(zip((False, True), most, strict=True))


def chosen(setting: Setting, ids: Tensor) -> tuple[Way, float]:
    """The first way that fits, or the last; with its bytes."""
    plans: dict[str, dict[bool, float]] = {}
    for way in WAYS:
        if way.method not in plans:
            plans[way.method] = counted(setting, ids, way.method)
        if plans[way.method][way.offload] < room(setting):
            break
    return way, plans[way.method][way.offload]


# --- steps ----------------------------------------------------------------------------------------


def measured(tokens: int, setting: Setting) -> Iterator[Row]:
    """A row after each step, of which the first compiles."""
    context = setting.here
    torch.manual_seed(0)
    words = SIZES["tiny" if setting.small else "8b"]["vocab_size"]
    ids = torch.randint(words, (1, tokens), device=context.device)
    way, planned = chosen(setting, ids)
    if not CUDA and planned > room(setting) and context.rank() == context.size() - 1:
        raise torch.OutOfMemoryError(f"{planned:,.0f} bytes by the plan")
    model = trained(setting, tokens, way)
    want = math.log(words) if CUDA else alone(model, setting, ids)
    ids = mosaic.distribute(ids, 1, Layout.zigzag(tokens, context.size()))  # as it stays
    step, losses, taken = stepping(model, ids, way), [], []
    numbers = {"plan GiB": planned / GIB}
    for number in range(setting.steps):
        name = f"{way}" if number else "first step, with compiling"
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(float(step()))
        finish()
        taken += slowest([time.perf_counter() - begin])
        peak = torch.cuda.max_memory_allocated() / GIB if CUDA else math.nan
        rate = tokens / context.size() / taken[-1]
        numbers |= {"step s": taken[-1], "tokens/s/GPU": rate, "GiB": slowest([peak])[0],
                    "loss": losses[-1]}  # fmt: skip
        near = abs(losses[0] - want) < (1 if CUDA else 1e-4)
        right = near and losses[-1] <= losses[0]
        words = f"{'tiny' if setting.small else '8B'}, {way}"
        yield (row := Row(title(tokens), name, dict(numbers), words, right))
    if setting.profile:
        yield profiled(step).row(row)


def title(tokens: int) -> str:
    return f"whole Llama, {tokens:,} tokens"


def alone(model: Any, setting: Setting, ids: Tensor) -> float:
    """The loss of one process with the same weights."""
    with setting.here.device:
        plain = llama(setting, ids.shape[1])
    whole = {
        name: w.full_tensor() if isinstance(w, DTensor) else w
        for name, w in model.named_parameters()
    }
    plain.load_state_dict(whole)
    with torch.no_grad():
        return float(plain(input_ids=ids, labels=ids).loss)


def case(tokens: int) -> Case:
    return Case(f"whole: {tokens:,} tokens", partial(measured, tokens), 540)


# --- the longest length ---------------------------------------------------------------------------


def following(found: Mapping[int, bool], multiple: int) -> int | None:
    """The next length to try, by which ones fit: twice as many tokens, until it does not; then
    between. None where the longest is known to an eighth."""
    fits = max((n for n, does in found.items() if does), default=0)
    over = min((n for n, does in found.items() if not does), default=None)
    if over is None:
        return 2 * fits or None
    middle = (fits + over) // 2 // multiple * multiple
    return middle if fits < middle < over and over - fits > fits / 8 else None


def seconds(tokens: int, p: int) -> float:
    """Of a step of the 8B model, roughly: products of 8 billion weights, three times and once
    again in checkpoints, and causal attention in 32 layers of 4,096."""
    products = 8 * 8e9 * tokens
    attention = 3.5 * 32 * 2 * 4096 * tokens**2
    return (products + attention) / p / RATE
