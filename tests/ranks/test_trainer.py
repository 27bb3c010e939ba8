"""``mosaic.integrations.prepare``: every number that a Trainer logs is that of one process."""

from __future__ import annotations

import pytest
from compare import assert_logged, assert_resumed
from expecttest import assert_expected_inline
from sampling import FULL

jobs = pytest.importorskip("trainer_jobs", reason="needs accelerate and peft")

SHORT = {"max_steps": 3, "eval_steps": 3}
CHECKPOINTED = {"gradient_accumulation_steps": 2, "activation_checkpointing": True}
SMOOTHED = {"label_smoothing_factor": 0.1}


@pytest.mark.parametrize(
    "p, dp, options",
    [
        FULL(2, 1, SHORT),
        FULL(2, 1, {"texts": (24, 7)}),
        FULL(2, 2, {}),
        FULL(3, 1, SHORT),
        FULL(2, 2, CHECKPOINTED | SHORT),
        FULL(2, 1, {"how": "shard"}),
        FULL(2, 2, {"how": "shard"} | CHECKPOINTED),
        FULL(2, 1, SMOOTHED | SHORT),
        FULL(2, 2, {"streams": True}),
        FULL(2, 1, {"lora": True, "texts": (24, 7)}),
        FULL(2, 2, {"lora": True}),
    ],
)
def test_trainer(ranks, p: int, dp: int, options: dict) -> None:
    """Loss, norm of gradients, learning rate, tokens, evaluation's loss and metrics; with FSDP2,
    LoRA, accumulation and checkpointing."""
    [want] = ranks(1).run(jobs.trained, 0, dp, **{**options, "how": "alone"})
    for got in ranks(p * dp).run(jobs.trained, p, dp, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.full
@pytest.mark.parametrize("order", ["random", "batch_rebalance"])
def test_batches_are_those_of_replicas(ranks, order: str) -> None:
    """Where the texts do not fill the last batches, accelerate fills them up: as it does without
    Mosaic on as many processes as there are replicas. Trainer's own sampler knows them, too."""
    options = {"texts": (23, 7), "max_steps": 7, "eval_steps": 3, "train_sampling_strategy": order}
    want, _ = ranks(2).run(jobs.trained, 0, 2, how="plain", **options)
    for got in ranks(4).run(jobs.trained, 2, 2, **options, timeout=900):
        assert_logged(got, want)


@pytest.mark.parametrize(
    "options",
    [
        FULL({"how": "shard"}),
        FULL({}),
        FULL({"lora": True}),
        FULL({"how": "shard", "then": "shard"}),
        FULL({"how": "prepare", "then": "shard"}),
        FULL({"how": "shard", "then": "shard", "lora": True}),
    ],
)
def test_checkpoints(ranks, tmp_path, options: dict) -> None:
    """A run goes on from a checkpoint as if nothing had been, and plain transformers reads it."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    [want] = ranks(1).run(jobs.resumed, 0, alone, lora=options.get("lora", False))
    for got in ranks(2).run(jobs.resumed, 2, together, **options, timeout=900):
        assert_resumed(got, want)


@pytest.mark.full
def test_workers_of_a_replica_are_seeded_alike(ranks) -> None:
    assert ranks(4).run(jobs.seeds) == [(0, 0), (0, 0), (1, 1), (1, 1)]


def test_refused(ranks) -> None:
    said, other = ranks(2).run(jobs.refused)
    assert said.keys() == other.keys()
    assert "DynamoBackend" in said.pop("backend")  # accelerate's own list, and its own error
    assert said.pop("other texts").startswith(
        "ShardingError: ranks of one sequence-parallel group were given different data: "
        "argument input_ids\n  ranks  [1] differ from rank 0"
    )
    assert_expected_inline(
        "\n".join(said.values()),
        """\
ShardingError: mosaic.init was not called
  fix  call mosaic.init(sp_size=...) on every rank first
ShardingError: there is no mesh axis 'columns'
  axes  dp, sp
  fix   use one of these, or name yours in mosaic.init(mesh_shape=..., mesh_axes=...)
ShardingError: the Trainer was prepared before
  fix  call prepare once
ShardingError: the Trainer has trained or evaluated before it was prepared
  fix  call mosaic.integrations.prepare(trainer) right after it is made
ShardingError: T5ForConditionalGeneration has not one axis of tokens
  fix  name the dims of its inputs: prepare(trainer, mosaic.ShardingSpec(inputs={...}))
ShardingError: torch_compile is set, and accelerate would compile the model once more
  fix  leave torch_compile out; prepare compiles the blocks of the model by Mosaic
ShardingError: dispatch_batches is set, and accelerate would deal batches out to all ranks
  fix  leave dispatch_batches out; every rank reads its own batches
ShardingError: model_init is set, and Trainer would make another model when it trains
  fix  leave model_init out; Trainer(model=...) takes one
ShardingError: fsdp_config has version 1, which shards flat parameters that Mosaic cannot see
  fix  leave it out, or fsdp_config={"version": 2}
ShardingError: fsdp_config has SIZE_BASED_WRAP, and what is sharded by itself is compiled so
  fix  name their class: transformer_layer_cls_to_wrap, or leave both out
ShardingError: transformer_layer_cls_to_wrap names T5Block, and LlamaForCausalLM has no such module
  fix  leave it out: the repeated blocks of the model are sharded
ShardingError: fsdp_config has a state_dict_type whose checkpoints plain transformers cannot load
  fix  fsdp_config={"state_dict_type": "FULL_STATE_DICT"}
ShardingError: fsdp_config has xla, for TPUs
  fix  leave it out, or fsdp_config={"version": 2}
ShardingError: save_on_each_node is set, and one rank alone gets the whole of what FSDP2 has cut
  fix  leave save_on_each_node out; copy the first node's files
ShardingError: the Trainer has fsdp, and prepare has fully_shard
  fix  leave one of them out; both apply FSDP2
ShardingError: the Trainer has an optimizer, of parameters that FSDP2 replaces
  fix  leave optimizers out, and give its class: Trainer(optimizer_cls_and_kwargs=...)
UnsupportedError: objects would be gathered for metrics from all ranks, and come twice
  fix  gather tensors: leave eval_use_gather_object out
ShardingError: accelerate has 1 processes, and Mosaic 2 ranks
  fix  start the script by torchrun, and call mosaic.init in each process""",
    )
