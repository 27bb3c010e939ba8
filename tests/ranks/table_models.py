"""TabPFN's and TabICL's inner models with random weights: small, and nothing is downloaded.

Everything is float64 and drawn from a fixed seed, so that two builds are equal bit for bit.
Rows are ``x[:train]`` to learn from and ``x[train:]`` to predict; only the former have a ``y``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

FEATURES = 5
TABLES = 2  # the batch
CLASSES = 3  # present in y; the models allow MAX_CLASSES
MAX_CLASSES = 4
OUTPUTS = 7  # regression: TabPFN's buckets, TabICL's quantiles


@dataclass(frozen=True)
class Table:
    """A model, a call of it, and where its rows are.

    ``model(**inputs)`` predicts the test rows. ``rows`` names the axis of all rows, by input,
    ``train_rows`` that of the training rows alone, ``out_rows`` that of the test rows in the
    output.
    """

    model: nn.Module
    inputs: dict[str, Any]
    rows: dict[str, int]
    train_rows: dict[str, int] = field(default_factory=dict)
    out_rows: int = 0


def train_size(rows: int) -> int:
    """How many of ``rows`` are training rows: the first 60 %."""
    return rows * 3 // 5


def redraw(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Draw anew each parameter that is all zero, and make the model float64.

    Output projections start at zero, which would leave outputs independent of most of the inputs.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=std)
    return model.double()


def _data(
    rows: int, tables: int, *, task: str, missing: bool, constant: bool, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows first: ``x`` of (rows, tables, features) and ``y`` of (training rows, tables)."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    train = train_size(rows)
    x = draw(rows, tables, FEATURES)
    if task == "regression":
        y = x[:train].sum(-1) + 0.1 * draw(train, tables)
    else:  # each class in each table, in an order of its own
        y = torch.stack(
            [torch.randperm(train, generator=generator) % CLASSES for _ in range(tables)], 1
        ).double()
    if constant:
        x[..., 1] = 0.75
    if missing:  # in the training rows of one table, and in the test rows of another
        x[1, 0, 2] = x[0, 0, 3] = x[rows - 1, -1, 0] = float("nan")
    return x, y


def _tabpfn(
    rows: int = 13,
    *,
    version: str,
    task: str = "multiclass",
    missing: bool = False,
    constant: bool = False,
    tables: int = TABLES,
    **config: Any,
) -> Table:
    module = import_module(f"tabpfn.architectures.tabpfn_{version}")
    heads = {
        "max_num_classes": MAX_CLASSES if task == "multiclass" else 0,
        "num_buckets": OUTPUTS if task == "regression" else -1,
    }
    if version in ("v2", "v2_5", "v2_6"):
        config = {"emsize": 12, "nlayers": 2, "nhead": 3, **heads, **config}
        config |= {} if version == "v2" else {"num_thinking_rows": 4}
    else:
        config = {
            "embed_dim": 12,
            "dist_embed_num_blocks": 2,
            "dist_embed_num_heads": 3,
            "dist_embed_num_inducing_points": 9,
            "feat_agg_num_blocks": 2,
            "feat_agg_num_heads": 3,
            "feat_agg_num_cls_tokens": 2,
            "nlayers": 2,
            "icl_num_heads": 3,
            "decoder_head_dim": 4,
            "decoder_num_heads": 2,
            "softmax_scaling_mlp_hidden_dim": 8,
            **heads,
            **config,
        }
        if version == "v3_5":  # one model has both heads
            config |= {"max_num_classes": MAX_CLASSES, "num_buckets": OUTPUTS}
            config.setdefault("fourier_encoding_num_frequencies", 3)
            config.setdefault("cell_ecdf_num_frequencies", 2)
    parsed, unused = module.parse_config(config)
    assert not unused, unused
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = redraw(module.get_architecture(parsed))
    x, y = _data(rows, tables, task=task, missing=missing, constant=constant)
    inputs: dict[str, Any] = {"x": x, "y": y}
    if version == "v3_5":
        inputs["task_type"] = task
    return Table(model.eval(), inputs, rows={"x": 0}, train_rows={"y": 0}, out_rows=0)


def _tabicl(rows: int = 13, *, task: str = "multiclass", **config: Any) -> Table:
    from tabicl import InferenceConfig
    from tabicl._model.layers import OneHotAndLinear
    from tabicl._model.tabicl import TabICL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TabICL(
            **{
                "max_classes": MAX_CLASSES if task == "multiclass" else 0,
                "num_quantiles": OUTPUTS,
                "embed_dim": 16,  # heads of 4 at least: RoPE divides by (head_dim - 2)
                "col_num_blocks": 2,
                "col_nhead": 4,
                "col_num_inds": 9,
                "row_num_blocks": 2,
                "row_nhead": 4,
                "row_num_cls": 2,
                "icl_num_blocks": 2,
                "icl_nhead": 4,
                "dropout": 0.0,
                **config,
            }
        )
        model = redraw(model)
    # OneHotAndLinear.forward says one_hot.float(), which a float64 weight refuses. In float32
    # it adds a bias to a chosen column: one rounding, so its outputs stay independent of order.
    for module in model.modules():
        if isinstance(module, OneHotAndLinear):
            module.float()
    x, y = _data(rows, TABLES, task=task, missing=False, constant=False)
    off = {"device": "cpu", "use_amp": False, "use_fa3": False, "offload": False}
    inputs = {
        "X": x.transpose(0, 1).contiguous(),  # (tables, rows, features)
        "y_train": y.transpose(0, 1).contiguous(),
        # Read in eval mode only. Without it, eval mode autocasts float32 to bfloat16, on CPUs too.
        "inference_config": InferenceConfig(COL_CONFIG=off, ROW_CONFIG=off, ICL_CONFIG=off),
    }
    return Table(model.eval(), inputs, rows={"X": 1}, train_rows={"y_train": 1}, out_rows=1)


def _models() -> dict[str, Callable[..., Table]]:
    models: dict[str, Callable[..., Table]] = {}
    for version in ("v2", "v2_5", "v2_6", "v3", "v3_5"):
        build = functools.partial(_tabpfn, version=version)
        models[f"tabpfn_{version}"] = build
        models[f"tabpfn_{version}_nan"] = functools.partial(build, missing=True)
        models[f"tabpfn_{version}_regression"] = functools.partial(build, task="regression")
    models["tabpfn_v2_shallow"] = functools.partial(_tabpfn, version="v2", nlayers=1)
    # A column that is dropped, by x[:, :, mask] with one table and by gather with more.
    models["tabpfn_v2_5_constant"] = functools.partial(
        _tabpfn, version="v2_5", constant=True, tables=1
    )
    # Eval mode in chunks of 4 rows and 2 columns; train mode never chunks.
    for version in ("v3", "v3_5"):
        models[f"tabpfn_{version}_chunked"] = functools.partial(
            _tabpfn,
            version=version,
            inference_chunk_cells=4 * TABLES * FEATURES,
            inference_col_chunk_size=2,
        )
    models["tabicl"] = _tabicl
    models["tabicl_regression"] = functools.partial(_tabicl, task="regression")
    # The first TabICL: columns embedded without y, hence the masked writes of skipped columns.
    models["tabicl_v1"] = functools.partial(
        _tabicl,
        col_affine=True,
        col_feature_group=False,
        col_target_aware=False,
        col_ssmax=False,
        icl_ssmax=False,
    )
    return models


MODELS: dict[str, Callable[..., Table]] = _models()
