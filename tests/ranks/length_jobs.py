"""Models whose inputs come in many lengths, and what one rank does with them in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from model_jobs import gradients, loss_of
from models.gpt import GPT
from models.table import TableModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mosaic

Batch = dict[str, Any]
WORDS = 23


def llama(**changed: Any) -> nn.Module:
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=256, use_cache=False, **changed)
    return LlamaForCausalLM(config).double()


def texts(n: int) -> Batch:
    ids = torch.randint(0, WORDS, (2, n))
    labels = ids.clone()
    labels[0, : n // 3] = -100
    return {"input_ids": ids, "labels": labels}


def padded_texts(n: int) -> Batch:
    """With a padding mask and positions, as a tokenizer gives them for texts of two lengths."""
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, n - n // 4 :] = 0
    positions = torch.arange(n).expand(2, n).clone()
    return {**texts(n), "attention_mask": mask, "position_ids": positions}


def gpt() -> nn.Module:
    return GPT(vocab=WORDS, context=256, embed=24, heads=3, layers=2).double()


def ids_and_labels(n: int) -> Batch:
    given = texts(n)
    return {"ids": given["input_ids"], "labels": given["labels"]}


class Encoder(nn.Module):
    """Sentences of several lengths, each way seen by all; the mean of each is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, padding: Tensor, labels: Tensor) -> Tensor:
        x = self.layers(self.words(ids), src_key_padding_mask=padding)
        kept = (~padding)[..., None].to(x.dtype)
        return F.cross_entropy(self.head((x * kept).sum(1) / kept.sum(1)), labels)


def encoder() -> nn.Module:
    return Encoder().double()


def sentences(n: int) -> Batch:
    padding = torch.zeros(2, n, dtype=torch.bool)
    padding[1, n - n // 4 :] = True
    return {
        "ids": torch.randint(0, WORDS, (2, n)),
        "padding": padding,
        "labels": torch.tensor([0, 2]),
    }


class Table(nn.Module):
    """The first 12 rows are for training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TableModel()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model.loss(x, y, 12)


def table() -> nn.Module:
    return Table().double()


def rows(n: int) -> Batch:
    return {"x": torch.randn(2, n, 4).double(), "y": torch.randint(0, 2, (2, n))}


def run_lengths(
    build: Callable[[], nn.Module],
    batch: Callable[[int], Batch],
    lengths: Sequence[int],
    options: dict | None = None,
    p: int = 1,
) -> dict[str, Any]:
    """Loss, gradients and plain outputs of one model for each length; with ``options`` through
    Mosaic on p ranks. And how many programs were compiled."""
    torch.manual_seed(0)
    model = build()
    called = model
    if options is not None:
        mosaic.init(sp_size=p)
        called = torch.compile(model, backend="mosaic", options={"inner": "eager", **options})
    with mosaic.plans() as plans:
        found = {n: one_step(model, called, batch, n) for n in lengths}
    return {"steps": found, "compiles": len(plans)}


def one_step(model: nn.Module, called: Any, batch: Callable[[int], Batch], n: int) -> dict:
    torch.manual_seed(n)
    model.zero_grad()
    out = called(**batch(n))
    loss = loss_of(out)
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model), "outputs": [*tensors(out)]}


def tensors(out: Any) -> Iterator[Tensor]:
    """What a model gives, by shape as well as by value."""
    values = [out] if isinstance(out, Tensor) else list(getattr(out, "values", lambda: out)())
    yield from (x.detach() for x in values if isinstance(x, Tensor))
