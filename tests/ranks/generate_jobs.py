"""Jobs that generate: transformers' ``generate`` with its caches, and a loop written by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recurrence_jobs import COMMON, HYBRID
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
)

import mosaic
from mosaic.frontend import decoding, user_warnings

WORDS, NEW = 31, 6


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def with_gated_deltas() -> Any:
    """Some of its layers have a state in place of keys and values."""
    torch.manual_seed(0)
    return (
        Qwen3NextForCausalLM(Qwen3NextConfig(**COMMON, **HYBRID, eos_token_id=None)).double().eval()
    )


def prompt(n: int = 11) -> Tensor:
    return torch.randint(1, WORDS, (2, n), generator=torch.Generator().manual_seed(n))


class Said(logging.Handler):
    """How often decoding was spoken of."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.times += record.getMessage() == decoding.SAID


def generated(p: int, how: str, cache: str, build: Callable[[], Any] = llama) -> dict[str, Any]:
    """Tokens and their logits, how many graphs were compiled, and what was cut; ``p`` = 0 is one
    process without Mosaic."""
    model = build()
    if p:
        mosaic.init(sp_size=p)
    if how == "parallelize":
        spec = mosaic.ShardingSpec(inputs={"input_ids": "batch tokens"}, axes={"tokens": "auto"})
        mosaic.parallelize(model, spec, blocks=[*model.model.layers], inner="eager")
    elif how == "compile":
        backend, options = ("mosaic", {"inner": "eager"}) if p else ("eager", None)
        model.forward = torch.compile(model.forward, backend=backend, options=options)
    given: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    found = counted(
        lambda: model.generate(
            prompt(),
            max_new_tokens=NEW,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
    )
    out = found.pop("result")
    return found | {"tokens": out.sequences, "logits": torch.stack(out.logits)}


def counted(run: Any) -> dict[str, Any]:
    """What a run gives, the graphs that it compiled, what they cut, and what was said of it."""
    torch._dynamo.reset()  # what the test's own process compiled before
    user_warnings._said.clear()
    counters.clear()
    said = Said()
    user_warnings.log.addHandler(said)
    try:
        with mosaic.plans() as plans, torch.no_grad():
            result = run()
    finally:
        user_warnings.log.removeHandler(said)
    graphs = counters["stats"]["unique_graphs"]
    return {
        "result": result,
        "graphs": graphs,
        "cut": [plan.layout for plan in plans],
        "gathered": [line for plan in plans for line in plan.gathered],
        "said": said.times,
    }


# --- a loop by hand -----------------------------------------------------------------------------


class Decoder(nn.Module):
    """Gives the logits of the last token, and its keys and values beside those of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = (
            nn.Embedding(WORDS, 16),
            nn.Linear(16, 48),
            nn.Linear(16, WORDS),
        )

    def forward(self, ids: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.head(y.transpose(1, 2).flatten(2)[:, -1]), (k, v)


def by_hand(p: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = Decoder().double()
    backend: str | None = "eager"
    options: Any = None
    if p:
        mosaic.init(sp_size=p)
        spec = mosaic.ShardingSpec(inputs={"ids": "batch tokens"}, axes={"tokens": "ring"})
        backend, options = "mosaic", {"inner": "eager", "spec": spec}
    model = torch.compile(model, backend=backend, options=options)

    def run() -> Tensor:
        ids, cache, logits = prompt(), None, []
        for _ in range(NEW):
            scores, cache = model(ids, cache)
            logits.append(scores)
            ids = scores.argmax(-1, keepdim=True)
        return torch.stack(logits)

    found = counted(run)
    return found | {"logits": found.pop("result")}


# --- a cache that stays cut ---------------------------------------------------------------------

LONGEST = 20


class WithRoom(Decoder):
    """Writes into a cache of a fixed length, in place."""

    def forward(self, ids: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        seen = torch.arange(LONGEST, device=at.device) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, seen)
        return self.head(y.transpose(1, 2).flatten(2)[:, -1])


def cut_cache(p: int) -> dict[str, Any]:
    """Each rank holds its keys and values of a cache, and every step attends to all of them."""
    torch.manual_seed(0)
    model: Any = WithRoom().double()
    cache = [torch.zeros(2, 4, LONGEST, 4, dtype=torch.float64) for _ in range(2)]
    backend, options = "eager", None
    if p:
        mosaic.init(sp_size=p)
        cache = [mosaic.distribute(x, 2) for x in cache]
        backend, options = "mosaic", {"inner": "eager"}
    model = torch.compile(model, backend=backend, options=options)

    def run() -> Tensor:
        ids, at, logits = prompt(), torch.arange(11), []
        for _ in range(NEW):
            scores = model(ids, at, *cache)
            logits.append(scores)
            ids, at = scores.argmax(-1, keepdim=True), at[-1:] + 1
        return torch.stack(logits)

    found = counted(run)
    rows = cache[0].local.shape[2] if p else LONGEST
    return found | {"logits": found.pop("result"), "rows": rows}


def cut_static_cache(p: int) -> dict[str, Any]:
    """transformers' StaticCache, cut when the prompt is in it."""
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=LONGEST)
    backend, options = ("mosaic", {"inner": "eager"}) if p else ("eager", None)
    if p:
        mosaic.init(sp_size=p)
    model.forward = torch.compile(model.forward, backend=backend, options=options)

    def run() -> Tensor:
        ids, at, logits = prompt(), torch.arange(11), []
        for _ in range(NEW):
            given = {"past_key_values": cache, "position_ids": at[None]}
            scores = model(ids, **given, logits_to_keep=1).logits[:, -1]
            if p and not logits:
                for layer in cache.layers:
                    layer.keys = mosaic.distribute(layer.keys, 2)
                    layer.values = mosaic.distribute(layer.values, 2)
            logits.append(scores)
            ids, at = scores.argmax(-1, keepdim=True), at[-1:] + 1
        return torch.stack(logits)

    found = counted(run)
    rows = cache.layers[0].keys.local.shape[2] if p else LONGEST
    return found | {"logits": found.pop("result"), "rows": rows}
