"""Tiny models of every family for text that transformers has, with weights that show in the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "n_positions": 256,
    # width, heads of 16 numbers, depth
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embedding_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_inner": 96,
    "d_ff": 96,
    "n_inner": 96,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    # state spaces and recurrences
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "lru_width": 64,
    "attention_window_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # the rest
    "sliding_window": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "hidden_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "embd_pdrop",
            "resid_pdrop",
            "attn_pdrop",
            "encoder_layerdrop",
            "decoder_layerdrop",
            "layerdrop",
        ),
        0.0,
    ),
}
"""Options of configurations by name; each family takes those that it has."""

MLA = {"num_key_value_heads": 4}
FOUR_LAYERS = {"num_hidden_layers": 4}
QWEN = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        MLA,
    ),
    "bailing_hybrid": MLA | {"layer_group_size": 2, "rotary_dim": 8, "partial_rotary_factor": 0.5},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": FOUR_LAYERS,
    "dots3_note": {"text_config": MLA},
    "dots3_note_text": MLA,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": GEMMA4["layer_types"]},
    "gemma4_text": GEMMA4,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": MLA | {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen3_5": {"text_config": QWEN},
    "qwen3_5_moe": {"text_config": QWEN},
    "qwen3_5_moe_text": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_next": QWEN,
    "qwen4_exp": {"text_config": QWEN},
    "qwen4_exp_text": QWEN,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 16},
    "xlm": {"emb_dim": 64, "n_words": VOCABULARY, "causal": True, "max_position_embeddings": 256},
    "xlstm": {"embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""Options of one family, over SIZES. None leaves an option as it is by default."""


def families() -> list[str]:
    """Every family with a causal language model, by `model_type`."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    return _shrunk(kind, FAMILIES.get(family, {}))


def _shrunk(kind: Any, options: dict[str, Any]) -> Any:
    default = kind()
    known = {name for name in default.to_dict() if name not in default.sub_configs}
    chosen = {name: value for name, value in SIZES.items() if name in known}
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            chosen[name] = _shrunk(type(inner), options.get(name, {}))
    chosen |= {name: value for name, value in options.items() if name not in default.sub_configs}
    if getattr(default, "is_decoder", None) is False:
        chosen["is_decoder"] = True
    return kind(**{name: value for name, value in chosen.items() if value is not None})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, float32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    return spread(model).eval()


def spread(model: Any, seed: int = 0) -> Any:
    """Weights wide enough that every part of a model shows in its logits."""
    generator, done = torch.Generator().manual_seed(seed), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if isinstance(module, nn.Embedding):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() >= 2 and (name == "weight" or min(parameter.shape[-2:]) > 8):
                scale = parameter.shape[-1] ** -0.5
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if not torch.isfinite(parameter).all():
                parameter.data.zero_()
    return model
