"""A language model with many forms of a loss, and what one rank does with it in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from model_jobs import gradients
from parallel_jobs import said, whole
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mosaic
from mosaic.losses import blocks, heads, op
from mosaic.runtime import mesh

BATCH, N, DIM, CLASSES = 2, 13, 8, 29


class Model(nn.Module):
    """One causal attention, a head, and a loss of the logits and the labels."""

    def __init__(self, loss: Callable[[Model, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.head = nn.Linear(DIM, CLASSES)
        self.register_buffer("weights", torch.rand(CLASSES))
        self.loss = loss

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).movedim(-3, 0).transpose(2, 3)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(
            2
        )

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.loss(self, self.hidden(ids), labels)


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1), **options)


def plain(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(m.head(x), y)


def shifted(m: Model, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    return flat(logits[..., :-1, :].contiguous(), y[..., 1:].contiguous())


def summed(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(m.head(x), y, reduction="sum") / 7


def of_each_token(m: Model, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(m.head(x).transpose(1, 2), y, reduction="none")
    return (losses * torch.arange(N, dtype=x.dtype)).sum()


def weighted(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(m.head(x), y.clamp(min=0), weight=m.weights, ignore_index=3, label_smoothing=0.1)


def smooth(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(m.head(x), y, label_smoothing=0.2)


def capped(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(torch.tanh(m.head(x) / 2) * 2, y)


def tied(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(x @ m.embedding.weight.T * 0.5, y)


def frozen(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(F.linear(x, m.head.weight.detach()), y)


def two(m: Model, x: Tensor, y: Tensor) -> Tensor:
    """Of the next token, and of the one behind it."""
    logits = m.head(x)
    return flat(logits[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1)) + 0.3 * flat(
        logits[:, :-2].reshape(-1, CLASSES), y[:, 2:].reshape(-1)
    )


def returned(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.tanh(m.head(x)) * 3
    return flat(logits, y), logits


def broken(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = m.head(x)
    torch._dynamo.graph_break()
    return flat(logits, y), logits


WITHOUT = (plain, shifted, summed, of_each_token, weighted, smooth, capped, tied, frozen, two,
           returned, broken)  # fmt: skip


def with_z_loss(m: Model, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    return flat(logits, y) + 1e-2 * logits.logsumexp(-1).square().mean()


def of_unlearned_logits(m: Model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = m.head(x)
    return flat(logits, y) + x.sum()


def of_probabilities(m: Model, x: Tensor, y: Tensor) -> Tensor:
    soft = F.one_hot(y.clamp(min=0), CLASSES).to(x.dtype)
    return flat_of(m.head(x), soft)


def flat_of(logits: Tensor, soft: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), soft.view(-1, CLASSES))


WITH = (with_z_loss, of_unlearned_logits, of_probabilities)


@contextmanager
def of_any_size() -> Iterator[None]:
    """However few logits there are, none is kept, and a block has few."""
    with mock.patch.object(heads, "LEAST", 0), mock.patch.object(blocks, "LARGEST", 40):
        yield


def run(loss: Callable, p: int | None, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Loss and gradients, of logits as well where they are returned; ``p`` None: plainly."""
    torch.manual_seed(0)
    model: Any = Model(loss).to(dtype)
    ids = torch.randint(0, CLASSES, (BATCH, N))
    labels = ids.roll(1, -1)
    labels[:, ::5] = -100
    called = model
    if p is not None:
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    with of_any_size(), mosaic.plans() as plans:
        out = called(ids, labels)
        found, logits = out if isinstance(out, tuple) else (out, None)
        total = found if logits is None else found + (logits * logits[:, :1]).mean()
        total.backward()
    return {
        "loss": found.detach(),
        "logits": None if logits is None else logits.detach().clone(),
        "kind": type(logits).__name__,
        "gradients": gradients(model),
        "kept": sum(has_logits(graph) for plan in plans for graph in plan.graphs.values()),
        "notes": [note for plan in plans for note in plan.notes if note.startswith("no logits")],
    }


def has_logits(graph: torch.fx.Graph) -> bool:
    """Whether a graph makes a tensor of tokens x classes."""
    vals = (node.meta.get("val") for node in graph.nodes)
    shapes = [tuple(x.shape) for x in vals if isinstance(x, Tensor)]
    return any(len(s) > 1 and s[-1] == CLASSES and s != (DIM, CLASSES) for s in shapes)


# --- transformers -------------------------------------------------------------------------------


def llama(layers: int = 1) -> nn.Module:
    config = LlamaConfig(
        vocab_size=CLASSES, hidden_size=DIM, intermediate_size=DIM, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Its loss is behind a break."""
    config = GPT2Config(
        vocab_size=CLASSES, n_embd=DIM, n_layer=1, n_head=2, n_positions=64,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


#: What a step of training is given: as Trainer does it, the second time.
STEPS: tuple[dict[str, int], ...] = ({}, {"num_items_in_batch": 31})


def run_library(
    build: Callable[[], nn.Module], p: int | None, steps: Sequence[dict[str, int]] = STEPS
) -> dict[str, Any]:
    """Some steps of training (float32: the loss is). ``p`` None: plainly; 0: nobody has called
    ``mosaic.init``."""
    torch.manual_seed(0)
    model: Any = build()
    called = model
    if p:
        mosaic.init(sp_size=p)
    if p is not None:
        called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    with of_any_size(), mosaic.plans() as plans:
        for more in steps:
            ids = torch.randint(0, CLASSES, (BATCH, N))
            out = called(input_ids=ids, labels=ids, use_cache=False, **more)
            optimizer.zero_grad()
            out.loss.backward()
            losses.append(out.loss.item())
            best = out.logits.argmax(-1)
            optimizer.step()
    notes = [note for plan in plans for note in plan.notes if note.startswith("no logits")]
    return {"losses": losses, "best": best, "gradients": gradients(model), "notes": notes}


def without_init(build: Callable[[], nn.Module]) -> dict[str, Any]:
    with mock.patch.object(mesh, "_context", None):
        return run_library(build, 0, STEPS[:1])


NAMES = {name: "batch tokens" for name in ("input_ids", "labels", "position_ids")}


def run_parallelized(p: int | None, fully_shard: bool = False, tied: bool = False) -> dict:
    """Two steps of training block by block: what there is of the loss is eager. Of the first one
    the logits are read, too."""
    torch.manual_seed(0)
    model: Any = llama(layers=2)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if p is not None:
        mosaic.init(sp_size=p)
        spec = mosaic.ShardingSpec(inputs=NAMES, axes={"tokens": "auto"})
        options = {"fully_shard": fully_shard, "inner": "eager"}
        model = mosaic.parallelize(model, spec, **options)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    with of_any_size(), mock.patch.object(op, "forward", wraps=op.forward) as blockwise:
        for reads in (True, False):
            ids = torch.randint(0, CLASSES, (BATCH, N))
            out = model(input_ids=ids, labels=ids, use_cache=False)
            logits = out.logits.full_tensor() if p and tied else out.logits
            total = out.loss + (logits[:, 3].square().mean() if reads else 0)
            optimizer.zero_grad()
            total.backward()
            found.append(out.loss.item())
            grads = {name: whole(w.grad).clone() for name, w in model.named_parameters()}
            optimizer.step()
    kept = getattr(out.logits, "kept", "plain")
    return {"losses": found, "gradients": grads, "calls": blockwise.call_count, "kept": kept,
            "refused": said(lambda: out.logits.sum()) if p else ""}  # fmt: skip


def read_late(p: int) -> str:
    """What reading logits says after the head has changed."""
    torch.manual_seed(0)
    model: Any = Model(returned)
    mosaic.init(sp_size=p)
    called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    ids = torch.randint(0, CLASSES, (BATCH, N))
    with of_any_size():
        _, logits = called(ids, ids)
    with torch.no_grad():
        model.head.weight.add_(1)
    return said(lambda: logits.sum())
