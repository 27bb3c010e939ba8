"""Trains transformers' Llama on packed texts: FSDP2, checkpoints, every text cut over ranks.

    python examples/train_llama_fsdp.py                              # 2 replicas x 2 ranks, tiny
    python examples/train_llama_fsdp.py --plan --size 8b --ranks 8 --length 131072   # needs no GPU
    torchrun --nproc-per-node=8 examples/train_llama_fsdp.py --size 8b --length 131072 --sp-size 8

The plan is made of a model without memory: what each GPU will hold and send. Needs transformers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from launch import device, launch
from measure import gibibytes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

import mosaic

SIZES = {
    "tiny": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500_000.0,
    },
}  # fmt: skip
INPUTS = dict.fromkeys(("input_ids", "labels", "position_ids"), "batch tokens")
SPEC = mosaic.ShardingSpec(inputs=INPUTS, axes={"tokens": "auto"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--ranks", type=int, default=4, help="processes to start, or to plan for")
    parser.add_argument("--sp-size", type=int, default=2, help="ranks that share one text")
    parser.add_argument("--length", type=int, default=384, help="tokens of one row of texts")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--inner", choices=["eager", "inductor"], help="inductor on GPUs")
    parser.add_argument("--plan", action="store_true", help="plan for --ranks, train nothing")
    given = parser.parse_args()
    if given.plan:
        print_plan(given)
    else:
        launch(run, given.ranks, given)


def run(given: argparse.Namespace) -> None:
    """What every rank does."""
    ranks = mosaic.init(given.sp_size, device=device())
    inner = given.inner or ("inductor" if ranks.device.type == "cuda" else "eager")
    torch.manual_seed(0)  # ranks that share a text must build the same model
    model = mosaic.parallelize(
        llama(given).to(ranks.device),
        SPEC,
        fully_shard={"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        checkpoint=True,
        inner=inner,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, begin = packed(given.length, ranks.dp_rank, ranks.device), time.perf_counter()
    for step in range(given.steps):
        loss = model(**next(rows), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ranks.rank() == ranks.dp_rank == 0:
            took, begin = time.perf_counter() - begin, time.perf_counter()
            print(f"step {step}  loss {loss.item():.3f}  {took:.2f} s", flush=True)
    if ranks.rank() == ranks.dp_rank == 0 and ranks.device.type == "cuda":
        print(f"largest GPU memory in use  {gibibytes(torch.cuda.max_memory_allocated())}")


def llama(given: argparse.Namespace) -> LlamaForCausalLM:
    positions = max(given.length, 2048)
    config = LlamaConfig(**SIZES[given.size], max_position_embeddings=positions, use_cache=False)
    return LlamaForCausalLM(config)


def packed(length: int, replica: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Rows of several texts, one behind the other. Positions begin anew with each: transformers
    takes them for documents that do not see each other."""
    texts = [topics[name].encode("ascii", "ignore") for name in sorted(topics)]
    draw = torch.Generator().manual_seed(replica)  # ranks that share a text draw the same one
    while True:
        ids: list[int] = []
        positions: list[int] = []
        while len(ids) < length:
            text = texts[int(torch.randint(len(texts), (), generator=draw))][: length // 3]
            ids += text
            positions += range(len(text))
        row, at = (torch.tensor([x[:length]], device=device) for x in (ids, positions))
        first = at == 0  # no text is guessed from the one before it
        yield {"input_ids": row, "labels": row.masked_fill(first, -100), "position_ids": at}


def print_plan(given: argparse.Namespace) -> None:
    """What a rank of many will hold and send, of a model without memory."""
    with torch.device("meta"):
        model = llama(given).to(torch.bfloat16).train()
        ids = torch.zeros(1, given.length, dtype=torch.long)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {"input_ids": ids, "labels": ids}
    names = mosaic.ShardingSpec(inputs=dict.fromkeys(inputs, "batch tokens"), axes=SPEC.axes)
    plan = mosaic.explain(model, **inputs, spec=names, sp_size=given.ranks)
    print(f"{len(plan.attentions)} attentions, each: {plan.attentions[0]}\n")
    held = plan.memory(shards=given.ranks, dtype=torch.float32)
    count = sum(x.numel() for x in model.parameters())
    print(f"{count:,} parameters in float32, {given.length:,} tokens; each of {given.ranks} GPUs:")
    print(held)


if __name__ == "__main__":
    main()
