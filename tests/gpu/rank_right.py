"""Is it right on these ranks: methods against float64, whole models, 20 steps of training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import check_methods
import check_models
import torch
from case_runner import CUDA, Case, Row, Setting
from models.llama import Llama
from rank_llama import INNER
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mosaic

#: In multiples of the error of one GPU: what the issue asks for, and what is right.
ASKED, RIGHT = 1.2, 1.5
STEPS = 20
SPEC = mosaic.ShardingSpec(
    inputs=dict.fromkeys(("ids", "labels"), "batch tokens"), axes={"tokens": "auto"}
)


def methods(setting: Setting) -> Iterator[Row]:
    worst = check_methods.check(setting.here, inner="eager")
    words = "" if worst <= ASKED else f"more than the {ASKED} that is asked for"
    numbers = {"x plain's error": worst}
    yield Row("every method, four masks", "against float64", numbers, words, worst <= RIGHT)


def models(name: str, setting: Setting) -> Iterator[Row]:
    apart, seconds = check_models.compared(name, INNER, setting.here.device)
    numbers = {"difference": apart, "first s": seconds}
    yield Row(f"model {name}, float64", "beside one process", numbers, "", apart < 1e-10)


def training(setting: Setting) -> Iterator[Row]:
    """AdamW, float64, FSDP2 and checkpoints: every loss, and the weights at the end."""
    torch.manual_seed(0)
    alone = Llama(vocab=128, embed=64, heads=4, kv_heads=2, hidden=128, layers=2)
    alone = alone.double().to(setting.here.device).train()
    cut = copy.deepcopy(alone)
    mosaic.parallelize(cut, SPEC, fully_shard=True, checkpoint=True, inner=INNER)
    want, got = trained(alone), trained(cut)
    losses = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    pairs = zip(cut.parameters(), alone.parameters(), strict=True)
    weights = max(float((whole(a) - b).abs().max() / b.abs().max()) for a, b in pairs)
    numbers = {"losses": losses, "weights": weights, "last loss": got[-1]}
    right = losses < 1e-9 and weights < 1e-6 and got[-1] < got[0]
    yield Row(f"{STEPS} steps, Llama, float64, FSDP2", "beside one process", numbers, "", right)


def trained(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    device, losses = next(model.parameters()).device, []
    for _ in range(STEPS):
        ids = torch.randint(128, (2, 253), generator=draw).to(device)
        loss = model(ids, ids)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def cases(p: int) -> list[Case]:
    names = ("llama", "table_few") if CUDA else ("llama",)
    return [
        Case("right: methods", methods, 120),
        Case("right: training", training, 120),
        *(Case(f"right: model {name}", partial(models, name), 90) for name in names),
    ]
