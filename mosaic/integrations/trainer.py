"""transformers' Trainer, and what is made of it (TRL's SFTTrainer), on sequence-parallel ranks.

mosaic.init(sp_size=4)
trainer = Trainer(model, args, train_dataset=texts)
mosaic.integrations.prepare(trainer)
trainer.train()

A callback cannot do it: Trainer counts batches and steps before it calls one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from mosaic.api.errors import ShardingError
from mosaic.api.spec import ShardingSpec
from mosaic.frontend.parallelize import parallelize
from mosaic.integrations.checkpoints import WholeOptimizer, load_whole, whole_state
from mosaic.integrations.checks import check_seen, check_trainer
from mosaic.integrations.fsdp import plugin_of, sharding_of
from mosaic.integrations.fused_head import take_parts
from mosaic.integrations.replicas import counting_replicas, share_batches, whole
from mosaic.runtime.mesh import MosaicContext, get_context

T = TypeVar("T", bound=Trainer)

#: The inputs of transformers' models that have tokens, where ``prepare`` gets no spec.
TOKENS: Mapping[str, str] = {
    "input_ids": "batch tokens",
    "inputs_embeds": "batch tokens _",
    "attention_mask": "batch tokens",
    "position_ids": "batch tokens",
    "token_type_ids": "batch tokens",
    "labels": "batch tokens",
    "shift_labels": "batch tokens",
}


def prepare(
    trainer: T,
    spec: ShardingSpec | None = None,
    *,
    fully_shard: bool | Mapping[str, Any] = False,
    inner: str = "inductor",
) -> T:
    """Make a Trainer train, evaluate and predict on sequence-parallel ranks, in place; gives it
    back. Call it once, after ``mosaic.init`` and before ``train``.

    spec: as of ``mosaic.parallelize``; without it the tokens of a transformers model are cut, by
        the quickest method.
    fully_shard, inner: as of ``mosaic.parallelize``. ``TrainingArguments(fsdp=True,
        fsdp_config={...})`` says it, too: Mosaic does then what accelerate would.

    The ranks of one replica get the same batches: ``per_device_train_batch_size`` and
    ``per_device_eval_batch_size`` are what one replica gets, not one rank. Every number that is
    logged is that of one process with the batches of all replicas.

    Raises ShardingError where the ranks, the spec and the Trainer do not fit together, and for
    options that make accelerate shard or compile the model itself.
    """
    ranks = get_context()
    model: Any = trainer.model
    spec = token_spec(model) if spec is None else spec
    plugin = plugin_of(trainer)
    check_trainer(trainer, spec, ranks, fully_shard, plugin)
    how: dict[str, Any] = {"fully_shard": fully_shard}
    if plugin is not None:
        how = sharding_of(plugin, model, ranks.device)
    parallelize(model, spec, **how, inner=inner)
    if how["fully_shard"]:
        load_whole(model)
    take_parts()
    trainer.is_fsdp_enabled = False  # nothing is left to accelerate
    is_cast = plugin is not None and plugin.mixed_precision_policy is not None
    share_batches(trainer.accelerator, ranks, is_cast)
    cls = type(trainer)
    trainer.__class__ = type(cls.__name__, (SequenceParallel, cls), {"ranks": ranks})
    return trainer


def token_spec(model: nn.Module) -> ShardingSpec:
    """The tokens of a decoder or an encoder are cut.

    Raises ShardingError for a model with other inputs.
    """
    known = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    inputs = {name: dims for name, dims in TOKENS.items() if takes_any or name in known}
    has_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if has_two or not inputs:
        raise ShardingError(
            f"{type(model).__name__} has not one axis of tokens",
            fix="name the dims of its inputs: prepare(trainer, mosaic.ShardingSpec(inputs={...}))",
        )
    return ShardingSpec(inputs=inputs, axes={"tokens": "auto"})


class SequenceParallel(Trainer):
    """What a Trainer does otherwise where several ranks share a batch. (``prepare`` makes it a
    base of the trainer's own class.)"""

    ranks: MosaicContext

    def get_total_train_batch_size(self, args: Any) -> int:
        with counting_replicas(args, self.ranks):
            return super().get_total_train_batch_size(args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        with counting_replicas(self.args, self.ranks, self.ranks.dp_rank):
            return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Of the parameters' parts: FSDP2 leaves the root's whole after an evaluation."""
        model: Any = self.model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().create_optimizer(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with counting_replicas(self.args, self.ranks):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with counting_replicas(self.args, self.ranks):
            return super().predict(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> Any:
        """Of this rank: it has its share of the batch."""
        in_replica = prod(self.ranks.size(axis) for axis in self.ranks.axes if axis != "dp")
        return super().floating_point_ops(inputs) / in_replica

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predictions are whole: metrics are computed from them."""
        return whole(super().prediction_step(*args, **kwargs))

    # --- checkpoints: where FSDP2 has cut the parameters, they are joined and cut again ---------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model: Any = self.model
        if is_cut(model):
            state_dict = whole_state(model)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.optimizer_whole() as optimizer:
            if not self.args.should_save and is_cut(self.model):
                optimizer.state_dict()  # which all ranks must call
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.optimizer_whole():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        check_seen(self.state.best_model_checkpoint, self.ranks)
        super()._load_best_model()

    @contextmanager
    def optimizer_whole(self) -> Iterator[Any]:
        trainer: Any = self
        own = trainer.optimizer
        if is_cut(self.model):
            trainer.optimizer = WholeOptimizer(own.optimizer)
        try:
            yield trainer.optimizer
        finally:
            trainer.optimizer = own


def is_cut(model: Any) -> bool:
    return isinstance(model, FSDPModule)
