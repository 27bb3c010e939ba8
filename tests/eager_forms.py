"""Models of transformers with the attention that they write out themselves, tiny, in float64."""

from __future__ import annotations

from dataclasses import dataclass
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

TILES, KEYS, DENSE = "float by tiles", "bias of keys", "dense float"
#: How far results may be apart where norms, softmax or all of it are taken in float32.
SINGLE = 1e-5


@dataclass(frozen=True)
class Form:
    """A class of transformers, its config's numbers, and its attentions' masks in the plan."""

    kind: str
    numbers: dict[str, Any]
    masks: tuple[str, ...] = (TILES, TILES)
    tol: float = 1e-12
    dtype: torch.dtype = torch.float64


FORMS = {
    "llama": Form("LlamaForCausalLM", GROUPED, tol=SINGLE),
    "mistral": Form("MistralForCausalLM", {**GROUPED, "sliding_window": 6}, tol=SINGLE),
    "mixtral": Form("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, tol=SINGLE),
    "qwen2": Form("Qwen2ForCausalLM", GROUPED, tol=SINGLE),
    "qwen3": Form("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, tol=SINGLE),
    "qwen3_moe": Form(
        "Qwen3MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
        tol=SINGLE,
    ),
    "gemma": Form("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, tol=SINGLE),
    "gemma3": Form(
        "Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}, tol=SINGLE
    ),
    "phi": Form("PhiForCausalLM", COMMON, tol=SINGLE),
    "phi3": Form("Phi3ForCausalLM", GROUPED, tol=SINGLE),
    "gpt2": Form("GPT2LMHeadModel", GPT2),
    "gpt_neox": Form("GPTNeoXForCausalLM", COMMON, tol=SINGLE),
    "gptj": Form(
        "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, tol=SINGLE, dtype=torch.float32
    ),
    "gpt_bigcode": Form("GPTBigCodeForCausalLM", GPT2),
    "gpt_oss": Form(
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ("sinks, causal, window 6, padding", "sinks, causal, padding"), SINGLE,
    ),
    "bloom": Form("BloomForCausalLM", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": Form("FalconForCausalLM", COMMON),
    "falcon, alibi": Form(
        "FalconForCausalLM", {**COMMON, "num_hidden_layers": 1, "alibi": True}, (TILES,)
    ),
    "mpt": Form(
        "MptForCausalLM",
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        tol=SINGLE, dtype=torch.float32,
    ),
    "opt": Form("OPTForCausalLM", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere": Form("CohereForCausalLM", GROUPED, tol=SINGLE),
    "olmo2": Form("Olmo2ForCausalLM", GROUPED, tol=SINGLE),
    "granite": Form("GraniteForCausalLM", GROUPED, tol=SINGLE),
    "deepseek_v3": Form(
        "DeepseekV3ForCausalLM",
        {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
         "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        tol=SINGLE,
    ),
    "starcoder2": Form("Starcoder2ForCausalLM", {**GROUPED, "sliding_window": 6}, tol=SINGLE),
    "stablelm": Form("StableLmForCausalLM", GROUPED, tol=SINGLE),
    "glm4": Form("Glm4ForCausalLM", {**GROUPED, "head_dim": 8}, tol=SINGLE),
    "bert": Form("BertForMaskedLM", COMMON, (KEYS, KEYS)),
    "roberta": Form("RobertaForMaskedLM", COMMON, (KEYS, KEYS)),
    "xlm_roberta": Form("XLMRobertaForMaskedLM", COMMON, (KEYS, KEYS)),
    "distilbert": Form(
        "DistilBertForMaskedLM",
        {**IDS, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
        (KEYS,),
    ),
    "albert": Form("AlbertForMaskedLM", {**COMMON, "embedding_size": 16}, (KEYS, KEYS)),
    "electra": Form("ElectraForMaskedLM", {**COMMON, "embedding_size": 16}, (KEYS, KEYS)),
    "deberta_v2": Form(
        "DebertaV2ForMaskedLM",
        {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        (DENSE, DENSE),
    ),
    "modernbert": Form(
        "ModernBertForMaskedLM", {**COMMON, "local_attention": 6}, (KEYS, TILES), SINGLE
    ),
    "t5": Form(
        "T5ForConditionalGeneration",
        {**IDS, **T5, "decoder_start_token_id": 0},
        (TILES, TILES, KEYS, KEYS),  # the decoder is whole
    ),
    "bart": Form(
        "BartForConditionalGeneration",
        {**IDS, **SEQ2SEQ, "max_position_embeddings": 64},
        (KEYS, KEYS, KEYS, KEYS),
    ),
    "whisper": Form(
        "WhisperForConditionalGeneration",
        {**IDS, **SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": N,
         "decoder_start_token_id": 1},
        ("", "", "", ""),
    ),
    "vit": Form(
        "ViTForImageClassification", {**COMMON, "image_size": 24, "patch_size": 4}, ("", "")
    ),
}  # fmt: skip


def built(name: str) -> Built:
    """The model, in evaluation mode, and its inputs."""
    import transformers

    form = FORMS[name]
    found = getattr(transformers, form.kind)
    config = found.config_class(**form.numbers, attn_implementation="eager")
    config._experts_implementation = "batched_mm"
    model = found(config).to(form.dtype).eval()
    with torch.no_grad():  # numbers as small as the first ones leave attention out of the result
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.2
    return model, inputs(name, form)


def inputs(name: str, form: Form) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24, dtype=form.dtype)}
    if name == "whisper":
        ids, sounds = torch.randint(3, VOCAB, (2, 7)), torch.randn(2, 8, 2 * N, dtype=form.dtype)
        return {"input_features": sounds, "decoder_input_ids": ids}
    ids = torch.randint(3, VOCAB, (2, N))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["attention_mask"][0, N - 6 :] = 0  # padding
    if form.kind.endswith("ForConditionalGeneration"):
        found["decoder_input_ids"] = ids.flip(1)
    return found
