# SPDX-License-Identifier: Apache-2.0
"""The model classes with MLA layers: how to configure a small model of each."""

from dataclasses import dataclass, field
from typing import Any

NUM_LAYERS = 2
MAX_MODEL_LEN = 1024

# One tensor-parallel rank of DeepSeek-V3: the first layer has an MLP, the second experts.
GEOMETRY: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 2048,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 1024,
    "max_position_embeddings": 4 * MAX_MODEL_LEN,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


YARN = {
    "rope_type": "deepseek_yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Model:
    """`config`: what its config.json has beside `GEOMETRY`; `draft`: its `--speculative-config`, if that is traced."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    num_mla_layers: int = NUM_LAYERS
    draft: dict[str, Any] = field(default_factory=dict, hash=False)
    draft_config: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.architecture


MTP = {"method": "mtp", "num_speculative_tokens": 1}
EAGLE = {"method": "eagle", "num_speculative_tokens": 1}
EAGLE_3 = {"method": "eagle3", "num_speculative_tokens": 1}

# A draft with model_type deepseek_v3 is taken for an MTP one.
DRAFT = {"model_type": "deepseek_v2", "num_hidden_layers": 1, "rope_parameters": YARN}

DEEPSEEK_V3 = Model("DeepseekV3ForCausalLM", {"model_type": "deepseek_v3"})
DEEPSEEK_MTP = Model("DeepSeekMTPModel", DEEPSEEK_V3.config, 1, MTP)

PANGU = {
    "model_type": "pangu_ultra_moe",
    "attention_bias": False,
    "mlp_bias": False,
    "sandwich_norm": True,
    "router_enable_expert_bias": True,
    "num_dense_layers": 1,
}
BAILING = {
    "model_type": "bailing_hybrid",
    "layer_group_size": 2,
    "num_experts": 8,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "head_dim": 128,
    "group_norm_size": 1,
    "use_qk_norm": True,
    "linear_silu": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
BAILING_V3 = BAILING | {"no_kda_lora": True, "short_conv_kernel_size": 4}
GLM_LITE = {"model_type": "glm4_moe_lite", "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256}
LONGCAT = {
    "model_type": "longcat_flash",
    "num_layers": NUM_LAYERS,
    "ffn_hidden_size": 2048,
    "expert_ffn_hidden_size": 2048,
    "moe_topk": 2,
    "zero_expert_num": 0,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "router_bias": False,
}
SARVAM = {
    "model_type": "sarvam_mla",
    "q_lora_rank": None,
    "num_experts": 8,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
}
LLAMA_4_SCALING = {"original_max_position_embeddings": 8192, "beta": 0.1}

MODELS = (
    Model("DeepseekV2ForCausalLM", {"model_type": "deepseek_v2", "q_lora_rank": None, "rope_parameters": YARN}),
    DEEPSEEK_MTP,
    Model("DeepseekV3BidirectionalModel", {"model_type": "deepseek_v3"}),
    Model("MistralLarge3ForCausalLM", DEEPSEEK_V3.config | {"llama_4_scaling": LLAMA_4_SCALING}),
    Model("Glm4MoeLiteForCausalLM", GLM_LITE),
    Model("Glm4MoeLiteMTPModel", GLM_LITE, 1, MTP),
    Model("LongcatFlashForCausalLM", LONGCAT, 2 * NUM_LAYERS),
    Model("LongCatFlashMTPModel", LONGCAT, 1, MTP),
    Model("AXK1ForCausalLM", {"model_type": "axk1"}),
    Model("PanguUltraMoEForCausalLM", PANGU),
    Model("OpenPanguMTPModel", PANGU, 1, MTP),
    Model("SarvamMLAForCausalLM", SARVAM),
    Model("BailingMoeV2_5ForCausalLM", BAILING, 1),
    Model("BailingMoeV25MTPModel", BAILING, 1, MTP),
    Model("BailingMoeV3ForCausalLM", BAILING_V3, 1),
    Model("BailingMoeV3MTPModel", BAILING_V3, 1, MTP),
    Model("EagleDeepSeekMTPModel", DEEPSEEK_V3.config, 1, EAGLE, DRAFT | {"model_type": "deepseek_v3"}),
    Model("Eagle3DeepseekV2ForCausalLM", DEEPSEEK_V3.config, 1, EAGLE_3, DRAFT),
    Model("EagleMistralLarge3ForCausalLM", DEEPSEEK_V3.config, 1, EAGLE, DRAFT),
)

# The architecture of the target whose draft is traced.
TARGETS = {
    "DeepSeekMTPModel": "DeepseekV3ForCausalLM",
    "Glm4MoeLiteMTPModel": "Glm4MoeLiteForCausalLM",
    "LongCatFlashMTPModel": "LongcatFlashForCausalLM",
    "OpenPanguMTPModel": "PanguUltraMoEForCausalLM",
    "BailingMoeV25MTPModel": "BailingMoeV2_5ForCausalLM",
    "BailingMoeV3MTPModel": "BailingMoeV3ForCausalLM",
    "EagleDeepSeekMTPModel": "DeepseekV3ForCausalLM",
    "Eagle3DeepseekV2ForCausalLM": "DeepseekV3ForCausalLM",
    "EagleMistralLarge3ForCausalLM": "MistralLarge3ForCausalLM",
}

SPARSE = "sparse MLA, traced as bare layers up to 0.28; from 0.29 on vLLM runs code of its own, uncompiled"
SAME_LANGUAGE_MODEL = "its language model is a class that is traced, behind a vision tower"
OWN_CODE = "vLLM's own fused code for it, never compiled"

# Architectures that name the wrapper somewhere, and why no layers of theirs are traced.
NOT_TRACED = {
    "DeepseekForCausalLM": "DeepSeek V1, of the same file, has no MLA",
    "GlmOcrMTPModel": "its layers are not MLA",
    "Eagle3DeepseekV3ForCausalLM": "the class of Eagle3DeepseekV2ForCausalLM",
    "LongcatFlashNgramForCausalLM": "the layers of LongcatFlashForCausalLM, with another embedding",
    "PanguEmbeddedForCausalLM": "no MLA",
    "PanguProMoEV2ForCausalLM": "no MLA",
    "DeepseekV32ForCausalLM": SPARSE,
    "DeepseekV32MTPModel": SPARSE,
    "GlmMoeDsaForCausalLM": SPARSE,
    "KimiK25ForConditionalGeneration": SAME_LANGUAGE_MODEL,
    "KimiVLForConditionalGeneration": SAME_LANGUAGE_MODEL,
    "OpenPanguVLForConditionalGeneration": SAME_LANGUAGE_MODEL,
    "BailingMoeV3VLForConditionalGeneration": SAME_LANGUAGE_MODEL,
    "KimiLinearForCausalLM": "no rotary embedding",
    "Dots3NoteForCausalLM": OWN_CODE,
    "Dots3NoteMTPModel": OWN_CODE,
    "Glm5NextForCausalLM": OWN_CODE,
    "Glm5NextForConditionalGeneration": OWN_CODE,
    "Glm5NextMTPModel": OWN_CODE,
}
