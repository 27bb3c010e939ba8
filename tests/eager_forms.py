"""Models of transformers with the attention that they write out themselves, tiny, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, torch.Tensor]]
N, VOCAB = 19, 29
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

#: Class and the config's numbers. With the class's name the config's is known.
LMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 6}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
    ),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "phi": ("PhiForCausalLM", COMMON),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**COMMON, "num_layers": 2, "num_heads": 4, "window_size": 6,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON),
    "gptj": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT2),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "bloom": ("BloomForCausalLM", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", COMMON),
    "falcon, alibi": ("FalconForCausalLM", {**COMMON, "alibi": True}),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    ),
    "opt": ("OPTForCausalLM", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere": ("CohereForCausalLM", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "granite": ("GraniteForCausalLM", GROUPED),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
         "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**GROUPED, "sliding_window": 6}),
    "stablelm": ("StableLmForCausalLM", GROUPED),
    "glm4": ("Glm4ForCausalLM", {**GROUPED, "head_dim": 8}),
    "bert": ("BertForMaskedLM", COMMON),
    "roberta": ("RobertaForMaskedLM", COMMON),
    "xlm_roberta": ("XLMRobertaForMaskedLM", COMMON),
    "distilbert": (
        "DistilBertForMaskedLM",
        {**IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "albert": ("AlbertForMaskedLM", {**COMMON, "embedding_size": 16}),
    "electra": ("ElectraForMaskedLM", {**COMMON, "embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "modernbert": ("ModernBertForMaskedLM", {**COMMON, "local_attention": 6}),
    "t5": ("T5ForConditionalGeneration", {**IDS, **T5, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {**IDS, **SEQ2SEQ, "max_position_embeddings": 64}),
}  # fmt: skip


def built(name: str, n: int = N) -> Built:
    """The model, in evaluation mode, and its inputs; the first text ends with padding."""
    if name in OTHERS:
        return OTHERS[name](n)
    kind, numbers = LMS[name]
    ids = torch.randint(3, VOCAB, (2, n))
    mask = torch.ones_like(ids)
    mask[0, n - 6 :] = 0
    return of_class(kind, numbers), {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.clone(),
    }


def of_class(kind: str, numbers: dict[str, Any]) -> nn.Module:
    import transformers

    found = getattr(transformers, kind)
    config = found.config_class(**numbers, attn_implementation="eager")
    config._experts_implementation = "batched_mm"
    model = found(config).double().eval()
    with torch.no_grad():  # numbers as small as the first ones leave attention out of the result
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.2
    return model


def whisper(n: int) -> Built:
    numbers = {**IDS, **SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": n}
    model = of_class("WhisperForConditionalGeneration", {**numbers, "decoder_start_token_id": 1})
    labels = torch.randint(3, VOCAB, (2, 7))
    return model, {"input_features": torch.randn(2, 8, 2 * n).double(), "labels": labels}


def vit(n: int) -> Built:
    numbers = {**COMMON, "image_size": 24, "patch_size": 4}
    model = of_class("ViTForImageClassification", numbers)
    pixels = torch.randn(2, 3, 24, 24).double()
    return model, {"pixel_values": pixels, "labels": torch.zeros(2, dtype=torch.long)}


OTHERS: dict[str, Callable[[int], Built]] = {"whisper": whisper, "vit": vit}
NAMES = (*LMS, *OTHERS)
