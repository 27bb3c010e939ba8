"""A job that runs a block of the README, as it stands there."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parallel_jobs import whole
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler
from trainer_jobs import Texts, arguments, launched, llama
from transformers import Trainer, TrainingArguments

import mosaic
import mosaic.integrations

README = Path(__file__).parents[2] / "README.md"


def blocks() -> dict[str, str]:
    """Those of the section "In your training script", by their first words."""
    section = README.read_text().partition("### In your training script")[2].partition("\n### ")[0]
    found = re.findall(r"```python\n# ([\w']+ ?[\w']*).*?\n(.*?)```", section, flags=re.DOTALL)
    return {name.strip(): code for name, code in found}


def weights(name: str, alone: bool) -> dict[str, Any]:
    """A model's, after a block. In one process a block is what it is without Mosaic's lines."""
    launched(not alone)
    os.chdir(tempfile.mkdtemp())
    code = blocks()[name]
    if alone:
        code = without_mosaic(code)
    torch.manual_seed(0)
    given = {"model": llama(), **names_of(name)}
    with ExitStack() as changed:  # Inductor would take a minute
        for function in (mosaic.parallelize, mosaic.integrations.prepare):
            changed.enter_context(mock.patch.dict(function.__kwdefaults__, inner="eager"))
        exec(compile(code, str(README), "exec"), given)
    model = given["trainer"].model if "trainer" in given else given["model"]
    found = {n.removeprefix("module."): w.detach() for n, w in model.named_parameters()}
    found = {n: whole(w) for n, w in found.items()}
    assert not any(torch.equal(w, found[n]) for n, w in llama().named_parameters())
    return found


def without_mosaic(code: str) -> str:
    """One rank that has the batches of all, as the replicas of one sp group are one."""
    code = re.sub(r"(?m)^spec = .*?\)\n", "", code, flags=re.DOTALL)
    code = re.sub(r"(?m)^(ranks = )?mosaic\..*\n|^model = .*\n", "", code)
    return re.sub(r"num_replicas=.*?, rank=.*?\)", "num_replicas=1, rank=0)", code)


def names_of(name: str) -> dict[str, Any]:
    """What a block takes from the script around it."""
    options = arguments(1, 1, "out", max_steps=3, lr_scheduler_type="constant")
    for own in ("output_dir", "per_device_train_batch_size"):
        options.pop(own)
    found: dict[str, Any] = {
        "mosaic": mosaic,
        "texts": Texts(6, 37, 0),
        "AdamW": partial(AdamW, lr=1e-3),
        "DataLoader": DataLoader,
        "DistributedSampler": DistributedSampler,
        "DistributedDataParallel": DistributedDataParallel,
        "Trainer": Trainer,
        "TrainingArguments": partial(TrainingArguments, **options),
    }
    if name.startswith("TRL"):
        import sft_jobs

        found["SFTConfig"] = partial(sft_jobs.SFTConfig, **options)
        found["SFTTrainer"] = sft_jobs.SFTTrainer
        found |= {"packs": sft_jobs.packable(6, 0), "tokenizer": sft_jobs.tokenizer()}
    return found
