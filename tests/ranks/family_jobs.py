"""Language models of transformers that differ from Llama in what matters when tokens are cut: norms
of queries and keys, windows by layer, parallel blocks, partial rotation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from length_jobs import WORDS
from torch import Tensor, nn

E, HEADS = 16, 4
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWS}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5, **NO_DROPOUT}),
}


class Family(nn.Module):
    """The model, and its loss in float64."""

    def __init__(self, name: str) -> None:
        super().__init__()
        family, sizes = FAMILIES[name]
        config = f"{family}TextConfig" if name == "gemma3" else f"{family}Config"
        made = getattr(transformers, config)(**SIZES, **sizes)
        self.model = getattr(transformers, f"{family}ForCausalLM")(made)

    def forward(self, input_ids: Tensor, labels: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids, **given).logits
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return logits, F.cross_entropy(logits.view(-1, WORDS), shifted.view(-1))


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Family(name).double()


BUILD = {name: partial(family, name) for name in FAMILIES}
