"""Jobs for ``mosaic.integrations``: transformers' Trainer and PEFT as scripts have them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    EvalPrediction,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import mosaic
import mosaic.integrations

BATCH = 2  # of one replica


def launched(by_torchrun: int | bool) -> None:
    """As torchrun has it for each process, or a script that runs alone."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    theirs = ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    for name in (*names, *theirs):
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


class Ragged(Texts):
    """Texts of two lengths."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        length = (37, 29)[i % 2]
        return {name: x[:length] for name, x in super().__getitem__(i).items()}


def padded(texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    texts = [text | {"attention_mask": torch.ones_like(text["labels"])} for text in texts]
    return {
        name: nn.utils.rnn.pad_sequence([text[name] for text in texts], True, value)
        for name, value in fill.items()
    }


class Stream(torch.utils.data.IterableDataset):
    """Texts that come one after the other."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.texts[i] for i in range(len(self.texts)))


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


def trainer_of(
    p: int,
    dp: int,
    how: str = "prepare",
    lora: bool = False,
    texts: tuple[int, int] = (24, 8),
    streams: bool = False,
    folder: str | None = None,
    fsdp_config: dict[str, Any] | None = None,
    on_gpus: bool = False,
    loaded_by: int | None = None,
    **options: Any,
) -> Trainer:
    """p = 0 is a script that runs alone, or (``how="plain"``) without Mosaic on ``dp`` ranks;
    ``how="shard"`` applies FSDP2, and so does ``fsdp_config``."""
    launched(p or how == "plain")
    given = {"eval_strategy": "steps", "eval_steps": 5} | options
    if p and fsdp_config is not None:
        given |= {"fsdp": True, "fsdp_config": dict(fsdp_config)}
    args = arguments(p or how == "plain", dp, folder or tempfile.mkdtemp(), **given)
    data = [Texts(count, 37, seed) for seed, count in enumerate(texts)]
    train, held_out = map(Stream, data) if streams else data
    trainer = Trainer(
        adapted(llama()) if lora else llama(),
        TrainingArguments(**args),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    if on_gpus and p:
        as_on_gpus(trainer)
    if loaded_by not in (None, dist.get_rank()):
        trainer.model.apply(emptied)
    if p:
        mosaic.init(sp_size=p)
        mosaic.integrations.prepare(trainer, fully_shard=how == "shard", inner="eager")
    return trainer


def emptied(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))


def as_on_gpus(trainer: Trainer) -> None:
    """accelerate's state as it is on GPUs, where it would apply FSDP2 itself."""
    state: Any = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    names = ["q_proj", "v_proj", "up_proj"]
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=names), autocast_adapter_dtype=False
    )


def trained(p: int, dp: int, **options: Any) -> list[dict[str, float]]:
    """What Trainer logs in 10 steps."""
    trainer = trainer_of(p, dp, **options)
    trainer.train()
    return numbers(trainer.state.log_history)


def resumed(
    p: int, folder: str, how: str = "prepare", then: str = "prepare", **given: Any
) -> dict[str, Any]:
    """Four steps, then the last two again from the checkpoint between; and what plain transformers
    (or PEFT) makes of what was saved."""
    options = {"how": how, "folder": folder, "max_steps": 4, "save_steps": 2}
    options |= {"save_strategy": "steps", "eval_strategy": "no"} | given
    once = trainer_of(p, 1, **options)
    once.train()
    again = trainer_of(p, 1, **options | {"how": then})
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    saved, plain = f"{folder}/checkpoint-4", type(llama())
    lora = given.get("lora", False)
    model = PeftModel.from_pretrained(llama(), saved) if lora else plain.from_pretrained(saved)
    return {
        "once": numbers(once.state.log_history),
        "again": numbers(again.state.log_history),
        "weights": {name: w.detach() for name, w in model.double().named_parameters()},
    }


def used(p: int, dp: int, folder: str, ragged: bool = False, **options: Any) -> dict[str, Any]:
    """Evaluated, trained, the best checkpoint loaded (of the largest loss), and predicted with."""
    steps = {"eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    best = {
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }  # loss: the best is the worst
    trainer = trainer_of(p, dp, folder=folder, **steps | best | options)
    if ragged:
        trainer.train_dataset, trainer.data_collator = Ragged(24, 37, 0), padded
    if options.get("how") != "plain":  # accelerate alone would train without averaging then
        trainer.evaluate()
    trainer.train()
    found = trainer.predict(Texts(4, 37, 3))
    return {
        "logged": numbers([*trainer.state.log_history, found.metrics]),
        "predictions": torch.from_numpy(found.predictions),
        "labels": torch.from_numpy(found.label_ids),
        "weights": {name: joined(w) for name, w in trainer.model.named_parameters()},
    }


def unseen() -> str:
    """Each rank has a folder of its own, and rank 0 writes."""
    trainer = trainer_of(2, 1)
    trainer.save_model()
    trainer.state.best_model_checkpoint = trainer.args.output_dir
    return said(trainer._load_best_model)


def joined(w: Tensor) -> Tensor:
    return w.full_tensor().detach() if isinstance(w, DTensor) else w.detach()


def seeds() -> tuple[int, int]:
    """Of a data loader's workers: the rank that they are told, and the replica."""
    trainer = trainer_of(2, 2, dataloader_num_workers=2)
    told = trainer.get_train_dataloader().worker_init_fn
    return told.keywords["rank"], mosaic.get_context().dp_rank


# --- what is refused ----------------------------------------------------------------------------


def refused() -> dict[str, str]:
    """What people would do wrong, each with a Trainer of its own."""
    prepare = mosaic.integrations.prepare
    found = {"before init": said(lambda: prepare(plain_trainer()))}
    mosaic.init(sp_size=2)
    rank = dist.get_rank()

    columns = mosaic.ShardingSpec(
        inputs={"input_ids": "batch tokens"}, axes={"tokens": mosaic.Ring(mesh="columns")}
    )
    found["mesh"] = said(lambda: prepare(plain_trainer(), columns))
    found["twice"] = said(lambda: prepare(prepare(plain_trainer(), inner="eager")))
    used = plain_trainer()
    used.evaluate()
    found["used"] = said(lambda: prepare(used))
    found["encoder"] = said(lambda: prepare(plain_trainer(t5())))
    for name, options in OPTIONS.items():
        found[name] = said(lambda given: prepare(plain_trainer(**given)), dict(options))
    found["sharded"] = said(
        lambda: prepare(plain_trainer(save_on_each_node=True), fully_shard=True)
    )
    found["sharded twice"] = said(lambda: prepare(plain_trainer(fsdp=True), fully_shard=True))
    found["optimizer"] = said(lambda: prepare(with_optimizer(), fully_shard=True))
    found["backend"] = said(lambda: plain_trainer(torch_compile_backend="mosaic"))

    other = prepare(plain_trainer(train_dataset=Texts(8, 13, rank)), inner="eager")
    found["other texts"] = said(other.train)
    found["objects"] = said(other.accelerator.gather_for_metrics, ["text"])
    found["alone"] = said(lambda: prepare(plain_trainer(by_torchrun=False)))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "compiled": {"torch_compile": True},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "made": {"model_init": llama},
    **{
        str(config): {"fsdp": True, "fsdp_config": config}
        for config in (
            {"version": 1, "sync_module_states": False},
            {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100},
            {"transformer_layer_cls_to_wrap": ["T5Block"]},
            {"state_dict_type": "SHARDED_STATE_DICT"},
            {"xla": True},
        )
    },
}


def plain_trainer(
    model: nn.Module | None = None, by_torchrun: bool = True, **options: Any
) -> Trainer:
    launched(by_torchrun)
    data = options.pop("train_dataset", Texts(8, 13, 0))
    made = options.pop("model_init", None)
    args = TrainingArguments(**arguments(1, 1, tempfile.mkdtemp(), **options))
    model = None if made else model or llama()
    return Trainer(model, args, train_dataset=data, eval_dataset=Texts(2, 13, 1), model_init=made)


def with_optimizer() -> Trainer:
    trainer = plain_trainer()
    trainer.create_optimizer()
    return trainer


def t5() -> nn.Module:
    sizes = {"vocab_size": 29, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def said(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except (mosaic.MosaicError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
