"""What one rank does in the tests of attentions that transformers writes out."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from eager_forms import built
from model_jobs import gradients
from torch import Tensor

import mosaic


def run(name: str, p: int, method: str | mosaic.Method = "ring") -> dict[str, Any]:
    """Logits and all gradients; p = 0 is one process without Mosaic."""
    torch.manual_seed(0)
    model, inputs = built(name)
    called = model
    if p:
        mosaic.init(sp_size=p)
        named = {key: "batch tokens" for key in inputs if key in ("input_ids", "attention_mask")}
        spec = mosaic.ShardingSpec(inputs=named, axes={"tokens": method}) if named else None
        options = {"inner": "eager", **({"spec": spec} if spec else {})}
        called = torch.compile(model, backend="mosaic", options=options)
    with mosaic.plans() as plans, patch.object(F, "softmax", in_own_dtype):
        logits = called(**inputs).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight.to(logits.dtype)).sum().backward()
    attentions = [found for plan in plans for found in plan.attentions]
    return {
        "logits": logits.detach(),
        "gradients": gradients(model),
        "attentions": [found.mask for found in attentions],
        "methods": {found.method for found in attentions},
        "gathered": sorted({line for plan in plans for line in plan.gathered}),
    }


softmax = F.softmax


def in_own_dtype(
    x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """transformers takes a softmax in float32, also of what is float64 here."""
    return softmax(x, dim=dim, dtype=None if dtype == torch.float32 else dtype)
