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
    "vocab_size": 1024,
    "max_position_embeddings": 4 * MAX_MODEL_LEN,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@dataclass(frozen=True)
class Model:
    """`config`: what its config.json has beside `GEOMETRY`."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    num_mla_layers: int = NUM_LAYERS

    def __str__(self) -> str:
        return self.architecture


DEEPSEEK_V3 = Model("DeepseekV3ForCausalLM", {"model_type": "deepseek_v3"})


def models_of(release: str) -> list[Model]:
    return [DEEPSEEK_V3]
