"""Jobs for ``mosaic.integrations``: transformers' Trainer, PEFT and TRL as scripts have them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import cases
import datasets
import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import mosaic
import mosaic.integrations

BATCH = 2  # of one replica


def launched(by_torchrun: int | bool) -> None:
    """As torchrun has it for each process, or a script that runs alone."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        os.environ.pop(name, None)
    if by_torchrun:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(zip(names, (rank, rank, size, size), strict=True))
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


class Texts(torch.utils.data.Dataset):
    """Each text has other labels that are left out, and so another number that count."""

    def __init__(self, count: int, length: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 29, (count, length), generator=draw)
        self.skipped = torch.randint(1, length // 2, (count,), generator=draw)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids[i].clone()
        labels[: self.skipped[i]] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def arguments(p: int, dp: int, folder: str, **options: Any) -> dict[str, Any]:
    """One process has the batches of all replicas."""
    size = BATCH if p else BATCH * dp
    return {
        "output_dir": folder, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "max_steps": 10, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "per_device_train_batch_size": size, "per_device_eval_batch_size": size,
        "include_num_input_tokens_seen": "all", "max_grad_norm": 0.5,
        **options,
    }  # fmt: skip


def llama() -> nn.Module:
    torch.manual_seed(0)
    return cases.hf_llama_alone()[0].double()


def numbers(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What is logged, but for times and rates."""
    times = ("_runtime", "_per_second", "_time")
    return [{k: x for k, x in log.items() if not k.endswith(times)} for log in logs]


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """How many of all predictions are right, and how many there are."""
    guessed, labels = found.predictions[:, :-1].argmax(-1), found.label_ids[:, 1:]
    counts = labels != -100
    return {"right": float((guessed == labels)[counts].sum()), "samples": float(len(labels)),
            "sum": float(np.abs(found.predictions).sum())}  # fmt: skip


def trained(
    p: int, dp: int, how: str = "prepare", lora: bool = False, texts: tuple[int, int] = (24, 8),
    folder: str | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """What Trainer logs in 10 steps, and where it leaves checkpoints. p = 0 is a script that runs
    alone, or (``how="plain"``) without Mosaic on ``dp`` ranks; ``how="shard"`` applies FSDP2."""
    launched(p or how == "plain")
    folder = folder or tempfile.mkdtemp()
    given = {"eval_strategy": "steps", "eval_steps": 5} | options
    args = TrainingArguments(**arguments(p or how == "plain", dp, folder, **given))
    model = llama()
    if lora:
        torch.manual_seed(1)
        wanted = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
        )
        model = get_peft_model(model, wanted, autocast_adapter_dtype=False)
    trainer = Trainer(
        model, args, train_dataset=Texts(texts[0], 37, 0), eval_dataset=Texts(texts[1], 37, 1),
        compute_metrics=accuracy,
    )  # fmt: skip
    if p:
        mosaic.init(sp_size=p)
        mosaic.integrations.prepare(trainer, fully_shard=how == "shard", inner="eager")
    trainer.train()
    return {"logs": numbers(trainer.state.log_history), "folder": folder}


# --- TRL ----------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 29)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def packable(count: int, seed: int) -> datasets.Dataset:
    """Texts that fill rows of 32 tokens, two in each, with borders that differ."""
    draw = torch.Generator().manual_seed(seed)
    borders = torch.randint(6, 16, (count,), generator=draw).tolist()
    lengths = [length for border in borders for length in (border, 32 - border)]
    texts = [torch.randint(3, 29, (n,), generator=draw).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": texts})


def tuned(
    p: int, dp: int, how: str = "prepare", lora: bool = False, **options: Any
) -> dict[str, Any]:
    """What SFTTrainer logs, with packed texts."""
    launched(p)
    given = {"eval_strategy": "steps", "eval_steps": 5, "packing": True, "max_length": 32} | options
    args = SFTConfig(**arguments(p, dp, tempfile.mkdtemp(), **given))
    trainer = SFTTrainer(
        llama(), args, train_dataset=packable(24, 0), eval_dataset=packable(8, 1),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None,
    )  # fmt: skip
    if p:
        mosaic.init(sp_size=p)
        mosaic.integrations.prepare(trainer, fully_shard=how == "shard", inner="eager")
    trainer.train()
    return {"logs": numbers(trainer.state.log_history)}
