"""``TrainingArguments(fsdp=True, fsdp_config={...})``: FSDP2 by accelerate's own options."""

from __future__ import annotations

import pytest
import torch
from compare import assert_logged, assert_resumed
from sampling import FULL
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

jobs = pytest.importorskip("trainer_jobs", reason="needs accelerate and peft")
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402

from mosaic.integrations.fsdp import sharding_of  # noqa: E402

SHORT = {"max_steps": 3, "eval_steps": 3}
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
WHOLE = {"state_dict_type": "FULL_STATE_DICT"}  # the default of transformers, not of accelerate
OFFLOADED = {"cpu_offload": True, "reshard_after_forward": False}


@pytest.mark.parametrize(
    "p, dp, config, options",
    [
        (2, 1, {"transformer_layer_cls_to_wrap": ["LlamaMLP"]}, {"on_gpus": True}),
        FULL(2, 1, LAYERS | {"activation_checkpointing": True}, {"on_gpus": True}),
        FULL(2, 1, {}, {}),
        FULL(3, 1, {"auto_wrap_policy": "NO_WRAP"}, {}),
        FULL(2, 2, OFFLOADED, {"gradient_accumulation_steps": 2}),
        FULL(2, 1, LAYERS, {"lora": True, "on_gpus": True}),
    ],
)
def test_numbers(ranks, p: int, dp: int, config: dict, options: dict) -> None:
    options = SHORT | options
    [want] = ranks(1).run(jobs.trained, 0, dp, **options)
    for got in ranks(p * dp).run(jobs.trained, p, dp, fsdp_config=config, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.full
def test_checkpoints(ranks, tmp_path) -> None:
    """Plain transformers reads what is saved, and a run goes on from it exactly."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    [want] = ranks(1).run(jobs.resumed, 0, alone)
    options = {"fsdp_config": OFFLOADED, "on_gpus": True}
    for got in ranks(2).run(jobs.resumed, 2, together, **options, timeout=900):
        assert_resumed(got, want)


@pytest.mark.full
def test_weights_of_rank_0(ranks) -> None:
    """With cpu_ram_efficient_loading the others' are nothing."""
    [want] = ranks(1).run(jobs.trained, 0, 1, **SHORT)
    options = SHORT | {"fsdp_config": {"cpu_ram_efficient_loading": True}, "loaded_by": 0}
    for got in ranks(2).run(jobs.trained, 2, 1, **options):
        assert_logged(got, want)


@pytest.mark.full
@pytest.mark.parametrize("config", [{}, None], ids=["fsdp", "autocast"])
def test_mixed_precision(ranks, config: dict | None) -> None:
    """bf16 in FSDP2's policy, as accelerate has it, or by autocast: as near as bf16 is."""
    options = SHORT | {"bf16": True}
    [want] = ranks(1).run(jobs.trained, 0, 1, **options)
    for got in ranks(2).run(jobs.trained, 2, 1, fsdp_config=config, **options):
        assert_logged(got, want, tol=2e-2)


def test_translated() -> None:
    """accelerate's options as arguments of ``mosaic.parallelize``."""
    model = jobs.llama()
    options = {"cpu_offload": True, "activation_checkpointing": True}
    options |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": False}
    options |= WHOLE
    names = ["LlamaMLP", "LlamaDecoderLayer"]
    plugin = FullyShardedDataParallelPlugin(2, transformer_cls_names_to_wrap=names, **options)
    plugin.set_mixed_precision("bf16")
    found = sharding_of(plugin, model, torch.device("cpu"))
    assert found["blocks"] == list(model.model.layers)
    assert found["checkpoint"]
    assert found["fully_shard"] == {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
        "reshard_after_forward": False,
    }
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    left_out = FullyShardedDataParallelPlugin(2, **WHOLE)
    want = {"fully_shard": True, "blocks": [model], "checkpoint": False}
    assert sharding_of(left_out, model, torch.device("cpu")) == want
