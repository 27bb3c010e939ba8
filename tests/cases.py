"""The models that tests run on ranks: small, float64, lengths that no p divides."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from models.gpt import GPT
from models.llama import Llama
from models.table import TableModel
from models.vit import ViT
from torch import Tensor, nn

import mosaic

Built = tuple[nn.Module, tuple, dict]


def gpt(batch: int = 3, n: int = 37, layers: int = 2, **config) -> Built:
    model = GPT(vocab=23, context=64, embed=24, heads=3, layers=layers, **config).double()
    ids = torch.randint(0, 23, (batch, n))
    labels = ids.clone()
    labels[0, 5:9] = -100
    return model, (ids, labels), {}


def llama(batch: int = 1, n: int = 37, **config) -> Built:
    model = Llama(**config).double()
    ids = torch.randint(0, 23, (batch, n))
    return model, (ids, ids), {}


def table(batch: int = 3, rows: int = 37, split: int = 26, **config) -> Built:
    model = TableModel(**config).double()
    return (
        model,
        (torch.randn(batch, rows, 5).double(), torch.randn(batch, split).double(), split),
        {},
    )


def vit(batch: int = 3, pool: str = "cls") -> Built:
    model = ViT(pool=pool).double()
    size = model_image_size(model)
    return (
        model,
        (torch.randn(batch, 3, size, size).double(), torch.zeros(batch, dtype=torch.long)),
        {},
    )


class Causal(nn.Module):
    """Causal attention of grouped queries in the way of Mistral: within a window of ``window``
    tokens, or within the documents of a packed row."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.tokens = nn.Embedding(23, 16)
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        x = self.tokens(ids)
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(ids.shape[1])
        behind = positions[:, None] - positions
        seen = behind >= 0
        if self.window:
            seen = seen & (behind < self.window)
        if documents is not None:
            seen = seen & (documents[:, :, None] == documents[:, None])[:, None]
        y = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(-2))


def window(batch: int = 2, n: int = 19) -> Built:
    return Causal(4).double(), (torch.randint(0, 23, (batch, n)),), {}


def documents(batch: int = 2, n: int = 19) -> Built:
    """Each row has other borders."""
    borders = torch.rand(batch, n) < 0.2
    return Causal(0).double(), (torch.randint(0, 23, (batch, n)), borders.cumsum(1)), {}


class Relative(nn.Module):
    """Attention with biases by distance in the way of T5: in logarithmic buckets, learned, of all
    layers the same; and padding in the way of transformers."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(23, 16), nn.Embedding(8, 4)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        distance = positions - positions[:, None]
        bucket = (distance.abs() + 1).log2().long().clamp(max=3) + 4 * (distance > 0)
        lowest = torch.finfo(x.dtype).min
        padding = torch.where(
            ids[:, None, None] > 2, torch.zeros_like(x[:, None, None, :1, 0]), lowest
        )
        bias = self.table(bucket).permute(2, 0, 1) + padding
        for qkv in self.qkv:
            q, k, v = qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, bias)
            x = x + y.transpose(1, 2).flatten(-2)
        return x


def relative(batch: int = 2, n: int = 19) -> Built:
    return Relative().double(), (torch.randint(0, 23, (batch, n)),), {}


def model_image_size(model: nn.Module) -> int:
    return getattr(model, "image", 32)


CAUSAL_LM = {
    "vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "attn_implementation": "sdpa", "use_cache": False,
}  # fmt: skip


def hf_llama(batch: int = 3, n: int = 37, checkpointing: bool = False) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CAUSAL_LM))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model, (), {"input_ids": (ids := tokens(29, batch, n)), "labels": ids.clone(),
                       "attention_mask": padding(batch, n)}  # fmt: skip


def hf_llama_alone(batch: int = 3, n: int = 37) -> Built:
    """Only ids, and so a mask that the model makes itself."""
    model, args, inputs = hf_llama(batch, n)
    return model, args, {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}


def hf_bert(batch: int = 3, n: int = 37) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    ids = tokens(29, batch, n)
    return model, (), {"input_ids": ids, "labels": ids.clone(), "attention_mask": padding(batch, n)}


def hf_llama_packed(batch: int = 3, n: int = 37) -> Built:
    """Three texts in each row: positions start again, and transformers sees it from that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = tokens(29, batch, n)
    positions = torch.cat([torch.arange(size) for size in (9, 16, n - 25)]).repeat(batch, 1)
    return LlamaForCausalLM(LlamaConfig(**CAUSAL_LM)), (), {
        "input_ids": ids, "labels": ids.clone(), "position_ids": positions,
    }  # fmt: skip


def hf_mistral(batch: int = 3, n: int = 37) -> Built:
    """A window of 6 tokens, and no mask given."""
    from transformers import MistralConfig, MistralForCausalLM

    ids = tokens(29, batch, n)
    model = MistralForCausalLM(MistralConfig(**CAUSAL_LM, sliding_window=6))
    return model, (), {"input_ids": ids, "labels": ids.clone()}


def hf_gemma2(batch: int = 3, n: int = 37, padded: bool = True) -> Built:
    """Eager attention with a softcap; one layer with a window of 6 tokens, and a full one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **CAUSAL_LM | {"attn_implementation": "eager"}, head_dim=8, sliding_window=6,
        attn_logit_softcapping=0.5, final_logit_softcapping=3.0, query_pre_attn_scalar=8,
    )  # fmt: skip
    ids = tokens(29, batch, n)
    mask = {"attention_mask": padding(batch, n)} if padded else {}
    return Gemma2ForCausalLM(config), (), {"input_ids": ids, "labels": ids.clone(), **mask}


def hf_mixtral(batch: int = 3, n: int = 37) -> Built:
    """Experts in groups: tokens are sorted by expert, and put back."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**CAUSAL_LM, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    ids = tokens(29, batch, n)
    return MixtralForCausalLM(config), (), {"input_ids": ids, "labels": ids.clone()}


def hf_qwen3_next(batch: int = 3, n: int = 37) -> Built:
    """A layer of linear attention, whose recurrence over the tokens is gathered, and a full one."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **CAUSAL_LM, head_dim=8, layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1], linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    ids = tokens(29, batch, n)
    return Qwen3NextForCausalLM(config), (), {"input_ids": ids, "labels": ids.clone()}


def hf_t5(batch: int = 3, n: int = 37) -> Built:
    """Scores get a learned bias by distance: a float mask with a gradient."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=29, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), {
        "input_ids": tokens(29, batch, n), "attention_mask": padding(batch, n),
        "labels": tokens(29, batch, 13),
    }  # fmt: skip


def hf_t5_encoder(batch: int = 3, n: int = 37) -> Built:
    from transformers import T5EncoderModel

    model, args, inputs = hf_t5(batch, n)
    del inputs["labels"]
    return T5EncoderModel(model.config), args, inputs


def tokens(vocab: int, batch: int, n: int) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, n))


def padding(batch: int, n: int) -> torch.Tensor:
    """The last tokens of the first text are padding."""
    mask = torch.ones(batch, n, dtype=torch.long)
    mask[0, n - 6 :] = 0
    return mask


Spec = mosaic.ShardingSpec
ROWS = Spec(inputs={"x": "batch rows columns"}, axes={"rows": "ring"})
TOKENS = Spec(inputs={"input_ids": "batch tokens"}, axes={"tokens": "ring"})
CASES = {
    "hf_llama": (hf_llama, TOKENS),
    "hf_llama_checkpointing": (partial(hf_llama, checkpointing=True), TOKENS),
    "hf_llama_packed": (hf_llama_packed, TOKENS),
    "hf_llama_packed_auto": (hf_llama_packed, Spec(on_gather="error")),
    "hf_mistral": (hf_mistral, None),
    "hf_gemma2": (hf_gemma2, Spec(on_gather="error")),
    "hf_gemma2_alone": (partial(hf_gemma2, padded=False), Spec(on_gather="error")),
    "hf_mixtral": (hf_mixtral, Spec(on_gather="error")),
    "hf_qwen3_next": (hf_qwen3_next, None),
    "hf_bert": (hf_bert, TOKENS),
    "hf_t5": (hf_t5, TOKENS),
    "gpt": (gpt, None),
    "gpt_gather": (gpt, Spec(inputs={"ids": "batch tokens"}, axes={"tokens": "all_gather"})),
    "llama": (llama, None),
    "table": (table, ROWS),
    "relative": (relative, Spec(on_gather="error")),
    "table_auto": (table, None),
    "table_few": (partial(table, split=8), ROWS),
    "table_tiny": (partial(table, batch=1, rows=3, split=2, layers=1), ROWS),
    "vit": (vit, None),
    "vit_mean": (partial(vit, pool="mean"), None),
}

#: Models that are run by every method, with names for the dims of their inputs.
IDS = {"ids": "batch tokens"}
BY_METHOD = {
    "table": (partial(table, batch=1, rows=13, split=9, layers=1), ROWS.inputs),
    "llama": (partial(llama, batch=1, n=13, layers=1), IDS),
    "window": (window, IDS),
    "relative": (relative, IDS),
    "documents": (documents, {**IDS, "documents": "batch tokens"}),
}
