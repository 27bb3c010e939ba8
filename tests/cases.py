"""The models that tests run on ranks: small, float64, lengths that no p divides."""

from __future__ import annotations

from functools import partial

import torch
from models.gpt import GPT
from models.llama import Llama
from models.table import TableModel
from models.vit import ViT
from torch import nn

import mosaic

Built = tuple[nn.Module, tuple, dict]


def gpt(batch: int = 3, n: int = 37, **config) -> Built:
    model = GPT(vocab=23, context=64, embed=24, heads=3, layers=2, **config).double()
    ids = torch.randint(0, 23, (batch, n))
    labels = ids.clone()
    labels[0, 5:9] = -100
    return model, (ids, labels), {}


def llama(batch: int = 1, n: int = 37, **config) -> Built:
    model = Llama(**config).double()
    ids = torch.randint(0, 23, (batch, n))
    return model, (ids, ids), {}


def table(batch: int = 3, rows: int = 37, split: int = 26) -> Built:
    model = TableModel().double()
    return model, (torch.randn(batch, rows, 5).double(), torch.randn(batch, split).double(), split), {}


def vit(batch: int = 3, pool: str = "cls") -> Built:
    model = ViT(pool=pool).double()
    size = model_image_size(model)
    return model, (torch.randn(batch, 3, size, size).double(), torch.zeros(batch, dtype=torch.long)), {}


def model_image_size(model: nn.Module) -> int:
    return getattr(model, "image", 32)


Spec = mosaic.ShardingSpec
ROWS = Spec(inputs={"x": "batch rows columns"}, axes={"rows": "ring"})
CASES = {
    "gpt": (gpt, None),
    "gpt_gather": (gpt, Spec(inputs={"ids": "batch tokens"}, axes={"tokens": "all_gather"})),
    "llama": (llama, None),
    "table": (table, ROWS),
    "table_auto": (table, None),
    "table_few": (partial(table, split=8), ROWS),
    "vit": (vit, None),
    "vit_mean": (partial(vit, pool="mean"), None),
}
