"""TabPFN and TabICL with their rows cut."""

from __future__ import annotations

from typing import Any

import table_models
import torch
from walk import whole_activations

import mosaic
from mosaic.frontend import user_warnings
from mosaic.report.plan import plans

MODES = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def run(p: int, name: str, how: str, mode: str, rows: int = 13) -> dict[str, Any]:
    """Output, gradients, and what was gathered; ``how``: "compiled", where y is cut, too, or
    "eager". p = 0 is one process without Mosaic."""
    torch._dynamo.reset()
    user_warnings._said.clear()
    table = table_models.MODELS[name](rows)
    model, inputs = table.model.train(mode == "train"), dict(table.inputs)
    leaves = {n: inputs[n].clone().requires_grad_(mode == "train") for n in table.rows}
    inputs |= leaves
    called: Any = model
    if p:
        mosaic.init(sp_size=p)
        cut = table.rows | (table.train_rows if how == "compiled" else {})
        inputs |= {n: mosaic.distribute(inputs[n], dim) for n, dim in cut.items()}
        if how == "compiled":
            called = torch.compile(model, backend="mosaic", options={"inner": "eager"})
    with MODES[mode](), plans() as found:
        out = called(**inputs)
        cut_dims = list(out.layout_along) if p else [table.out_rows]
        out = out.full_tensor() if p else out
        if mode == "train":
            out.square().sum().backward()
    learned = {**leaves, **dict(model.named_parameters())}
    return {
        "out": out.detach(),
        "gradients": {n: x.grad for n, x in learned.items() if x.grad is not None},
        "rows are cut": cut_dims == [table.out_rows],
        "graphs": len(found),
        "whole": whole_activations(found, rows),
        "gathered": gathered([line for plan in found for line in plan.gathered]),
    }


def gathered(planned: list[str]) -> list[str]:
    """Which ops, without lines of packages."""
    said = [text.partition("slow: ")[2] for text in user_warnings._said if "gathered" in text]
    return sorted({line.partition(" [")[0] for line in (*planned, *said)})
