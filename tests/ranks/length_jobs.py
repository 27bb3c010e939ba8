"""Models whose inputs come in many lengths, and what one rank does with them in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from model_jobs import gradients, loss_of
from models.gpt import GPT
from models.table import TableModel
from parallel_jobs import whole
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mosaic

Batch = dict[str, Any]
WORDS = 23


class Llama(nn.Module):
    """transformers' own, and its loss in float64: labels are shifted behind a pad."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))

    def forward(self, input_ids: Tensor, labels: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids, **given).logits
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return logits, F.cross_entropy(logits.view(-1, WORDS), shifted.view(-1))


def llama(layers: int = 2) -> nn.Module:
    return Llama(layers).double()


def llama_with_its_loss() -> nn.Module:
    """Which it takes in float32."""
    return llama(layers=1).model


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


def gpt(dropout: float = 0.0) -> nn.Module:
    sizes = {"embed": 24, "heads": 3, "layers": 2, "dropout": dropout}
    return GPT(vocab=WORDS, context=256, **sizes).double()


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
    how: str = "compile",
) -> dict[str, Any]:
    """Loss, gradients and outputs of one model for each length; with ``options`` through Mosaic on
    p ranks, by ``torch.compile`` or by ``mosaic.parallelize`` (``how``: a key of ``HOW``). And how
    many programs were compiled."""
    torch.manual_seed(0)
    model = build()
    called: Any = model
    if options is not None:
        mosaic.init(sp_size=p)
    if options is not None and how == "compile":
        called = torch.compile(model, backend="mosaic", options={"inner": "eager", **options})
    elif options is not None:
        blocks = None if how.startswith("blocks") else [model]
        given = {"blocks": blocks, "inner": "eager", **HOW[how]}
        called = mosaic.parallelize(model, options["spec"], **given)
    with mosaic.plans() as plans:
        found = {n: one_step(model, called, batch, n) for n in lengths}
    masks = {a.mask for plan in plans for a in plan.attentions if a.axis}
    return {"steps": found, "compiles": len(plans), "masks": masks}


#: Arguments of ``mosaic.parallelize``; the whole model is one graph, or its blocks are.
HOW: dict[str, dict[str, bool]] = {
    "parallelize": {},
    "fsdp": {"fully_shard": True},
    "blocks": {},
    "blocks, fsdp": {"fully_shard": True},
    "blocks, checkpoint": {"checkpoint": True},
}


def other_lengths(options: dict) -> str:
    """What a rank is told that has a longer batch than the other, in one bucket."""
    context = mosaic.init(sp_size=2)
    torch.manual_seed(0)
    called = torch.compile(gpt(), backend="mosaic", options={"inner": "eager", **options})
    called(**ids_and_labels(40))
    try:
        called(**ids_and_labels(37 + context.rank()))
    except mosaic.ShardingError as error:
        return str(error)
    return "no error"


def one_step(model: nn.Module, called: Any, batch: Callable[[int], Batch], n: int) -> dict:
    torch.manual_seed(n)
    model.zero_grad()
    out = called(**batch(n))
    loss = loss_of(out)
    loss.backward()
    found = {name: whole(x) for name, x in gradients(model).items()}
    return {"loss": loss.detach(), "gradients": found, "outputs": [*tensors(out)]}


def tensors(out: Any) -> Iterator[Tensor]:
    """What a model gives, by shape as well as by value."""
    values = [out] if isinstance(out, Tensor) else list(getattr(out, "values", lambda: out)())
    yield from (whole(x).detach() for x in values if isinstance(x, Tensor))


# --- ops that mix rows --------------------------------------------------------------------------


class Mixes(nn.Module):
    """Rows attend to each other, and one op takes what comes of it: (batch, rows, 4)."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.inner = nn.Linear(4, 4)
        self.places = nn.Embedding(12, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        y = F.scaled_dot_product_attention(y, y, y)
        return OPS[self.op](self, y)


def shifted(model: Mixes, y: Tensor) -> Tensor:
    ahead = torch.cat([y[:, 1:], y.new_zeros(y.shape[0], 1, 4)], 1)
    return (y * ahead).sum()


def by_hand(model: Mixes, y: Tensor) -> Tensor:
    weights = (y @ y.transpose(1, 2)).softmax(-1)
    return weights @ y


def positions(model: Mixes, y: Tensor) -> Tensor:
    return y + model.places(torch.arange(y.shape[1])) + model.places.weight[: y.shape[1]]


def last_of_mask(model: Mixes, y: Tensor) -> Tensor:
    last = (y[..., 0] > -9).long().sum(1) - 1
    return y.gather(1, last[:, None, None].expand(-1, 1, 4)).squeeze(1)


def causal_scores(model: Mixes, y: Tensor) -> Tensor:
    n = y.shape[1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (y @ y.transpose(1, 2)).masked_fill(hidden, -float("inf")).softmax(-1) @ y


def with_class_token(model: Mixes, y: Tensor) -> Tensor:
    y = torch.cat([model.places.weight[:1].expand(y.shape[0], 1, 4), y], 1)
    return F.scaled_dot_product_attention(y, y, y)[:, 0]


#: What has an exact form for rows of padding.
OPS: dict[str, Callable[[Mixes, Tensor], Any]] = {
    "sum": lambda m, y: y.sum(1),
    "sum_of_all": lambda m, y: y.square().sum(),
    "mean": lambda m, y: y.mean(1),
    "mean_of_all": lambda m, y: y.square().mean(),
    "mean_of_pairs": lambda m, y: (y @ y.transpose(1, 2)).mean((1, 2)),
    "prod": lambda m, y: y.prod(1),
    "amax": lambda m, y: y.amax(1),
    "min": lambda m, y: y.min(1).values,
    "argmax": lambda m, y: y.argmax(1) * y.sum(1),
    "any": lambda m, y: (y > 0.5).any(1) * y.sum(1),
    "all": lambda m, y: (y > -0.5).all(1) * y.sum(1),
    "logsumexp": lambda m, y: y.logsumexp(1),
    "softmax": lambda m, y: y.softmax(1),
    "cumsum": lambda m, y: y.cumsum(1),
    "diff": lambda m, y: y.diff(dim=1),
    "first": lambda m, y: y[:, 0],
    "last": lambda m, y: y[:, -1],
    "third_last": lambda m, y: y[:, -3],
    "some": lambda m, y: y[:, 1:3],
    "but_last": lambda m, y: y[:, :-1].mean(1),
    "from_second": lambda m, y: y[:, 1:].square().mean(),
    "pad": lambda m, y: F.pad(y, (0, 0, 2, 1), value=3.0).square().sum(),
    "covariance": lambda m, y: y.transpose(1, 2) @ y,
    "flattened": lambda m, y: y.flatten(0, 1) * 2,
    "mse": lambda m, y: F.mse_loss(y, y.detach() + 1),
    "huber_sum": lambda m, y: F.huber_loss(y, 2 * y.detach(), reduction="sum"),
    "cross_entropy": lambda m, y: F.cross_entropy(y.transpose(1, 2), y.detach().argmax(-1)),
    "nll": lambda m, y: F.nll_loss(y.log_softmax(-1).flatten(0, 1), y.argmax(-1).flatten()),
    "layer_norm": lambda m, y: (F.layer_norm(y, (4,)) * y.exp()).sum(),
    "cross_attention": lambda m, y: F.scaled_dot_product_attention(y[:, :2], y, y),
    "by_the_length": lambda m, y: (y.sum(1) - y.shape[1] + 2) / (2 * y.shape[1]),
    "conv": lambda m, y: F.conv1d(y.mT, m.places.weight.view(4, 4, 3), padding=1),
    "causal_conv": lambda m, y: F.conv1d(y.mT, m.inner.weight[:, None], padding=3, groups=4)[
        ..., :-3
    ],
    "unfold": lambda m, y: F.pad(y, (0, 0, 2, 0)).unfold(1, 3, 1).prod(-1),
    "outer": lambda m, y: (y[:, :, None] - y[:, None]).square().sum((1, 2, 3)),
    **{
        f.__name__: f
        for f in (shifted, by_hand, positions, last_of_mask, causal_scores, with_class_token)
    },
}
#: What has none (yet): each length is compiled by itself, and said.
ALONE: dict[str, Callable[[Mixes, Tensor], Any]] = {
    "flip": lambda m, y: y.flip(1),
    "roll": lambda m, y: y.roll(1, 1) * y,
    "sort": lambda m, y: y.sort(1).values,
    "var": lambda m, y: y.var(1),
    "every_second": lambda m, y: y[:, ::2],
    "last_three": lambda m, y: y[:, -3:],
    "batch_norm": lambda m, y: m.norm(y.transpose(1, 2)) * y.exp().transpose(1, 2),
    "conv_with_a_stride": lambda m, y: F.conv1d(y.mT, m.places.weight.view(3, 4, 4), stride=2),
    "by_a_root": lambda m, y: y * y.shape[1] ** 0.5,
    "fewer_rows_than_the_bucket": lambda m, y: y.sum(1) + m.inner.weight[: y.shape[1]].sum(),
    "half": lambda m, y: y[:, : y.shape[1] // 2],
    "row_behind": lambda m, y: torch.cat([y, y[:, :2]], 1),
    "negative_index": lambda m, y: y[:, torch.tensor([0, -1])],
    "last_by_number": lambda m, y: y[:, y.shape[1] - 1],
    "written_to": lambda m, y: y.index_fill(1, torch.tensor([1]), 0.0),
    "softmax_of_queries": lambda m, y: (y @ y.transpose(1, 2)).log_softmax(1),
}
OPS |= ALONE


def run_ops(names: Sequence[str], options: dict | None, lengths: Sequence[int], p: int) -> dict:
    """Outputs and gradients of each op for each length, and how many programs were compiled."""
    if options is not None:
        mosaic.init(sp_size=p)
    found = {}
    for name in names:
        torch._dynamo.reset()  # all of them are one function, of which some programs are kept
        torch.manual_seed(0)
        model = Mixes(name).double()
        called: Any = model
        if options is not None:
            called = torch.compile(model, backend="mosaic", options={"inner": "eager", **options})
        with mosaic.plans() as plans:
            steps = {n: op_step(model, called, n) for n in lengths}
        found[name] = {"steps": steps, "compiles": len(plans)}
    return found


def op_step(model: nn.Module, called: Any, n: int) -> dict[str, Tensor | None]:
    torch.manual_seed(n)
    x = torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    out = called(x)
    out.double().square().sum().backward()
    return {"out": out.detach(), "x": x.grad, **gradients(model)}
