"""A job for ``mosaic.integrations``: TRL's SFTTrainer as scripts have it."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trainer_jobs import arguments, launched, llama, numbers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import mosaic
import mosaic.integrations


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


def ragged(count: int, seed: int) -> datasets.Dataset:
    """Texts of all lengths, of which packs have all lengths, too."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 31, (count,), generator=draw).tolist()
    texts = [torch.randint(3, 29, (n,), generator=draw).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": texts})


TEXTS = {"packable": packable, "ragged": ragged}


def tuned(
    p: int,
    dp: int,
    how: str = "prepare",
    lora: bool = False,
    texts: str = "packable",
    **options: Any,
) -> list[dict[str, float]]:
    """What SFTTrainer logs in 10 steps, with packed texts."""
    launched(p)
    given = {"eval_strategy": "steps", "eval_steps": 5, "packing": True, "max_length": 32} | options
    given["fsdp"] = how == "fsdp_config"
    trainer = SFTTrainer(
        llama(),
        SFTConfig(**arguments(p, dp, tempfile.mkdtemp(), **given)),
        train_dataset=TEXTS[texts](24, 0),
        eval_dataset=TEXTS[texts](8, 1),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None,
    )
    if p:
        mosaic.init(sp_size=p)
        mosaic.integrations.prepare(trainer, fully_shard=how == "shard", inner="eager")
    trainer.train()
    return numbers(trainer.state.log_history)
