# SPDX-License-Identifier: Apache-2.0
"""Models for whole engines beside tiny-mla itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_run import MODEL

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "vocab_size": 1024,
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "vocab_size": 1024,
}


def v2_lite(folder: Path) -> str:
    """DeepSeek-V2-Lite with tiny-mla's vocabulary, as a config only: see `random_weights.py`.

    The values are those of https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json.
    """
    return _write(folder, V2_LITE)


def llama(folder: Path) -> str:
    """A model without MLA, as a config only: start it with `load_format="dummy"`."""
    return _write(folder, LLAMA)


def tiny_mla_with_mtp(folder: Path) -> str:
    """tiny-mla and a multi-token-prediction layer: a copy of its last layer behind a random mixture of its inputs."""
    config, weights = _tiny_mla()
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    prediction = f"model.layers.{layers}."
    extra = {prediction + name: value for name, value in _last_layer(config, weights).items()}
    extra |= {
        f"{prediction}eh_proj.weight": _mixture(hidden),
        f"{prediction}enorm.weight": _ones(hidden),
        f"{prediction}hnorm.weight": _ones(hidden),
        f"{prediction}embed_tokens.weight": weights["model.embed_tokens.weight"],
        f"{prediction}shared_head.norm.weight": weights["model.norm.weight"],
        f"{prediction}shared_head.head.weight": weights["lm_head.weight"],
    }
    # As many dense layers as there are now: the prediction layer shall have the MLP of the one that it copies.
    config |= {"num_nextn_predict_layers": 1, "first_k_dense_replace": layers + 1}
    return _write(folder, config, weights | extra)


def tiny_mla_eagle_draft(folder: Path) -> str:
    """A draft model for tiny-mla with the EAGLE method: a copy of its last layer behind a random mixture."""
    config, weights = _tiny_mla()
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    draft = {f"layers.0.{name}": value for name, value in _last_layer(config, weights).items()}
    draft |= {
        "fc.weight": _mixture(hidden),
        "enorm.weight": _ones(hidden),
        "hnorm.weight": _ones(hidden),
        "norm.weight": weights["model.norm.weight"],
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    # vLLM counts the draft's layers on from the target's, and takes its class from the config of a model with MTP.
    config |= {"num_hidden_layers": 1, "num_nextn_predict_layers": 1, "first_k_dense_replace": layers + 1}
    return _write(folder, config, draft)


def _tiny_mla() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return json.loads((MODEL / "config.json").read_text()), load_file(MODEL / "model.safetensors")


def _write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> str:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")
    return str(folder)


def _last_layer(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{config['num_hidden_layers'] - 1}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _mixture(hidden: int) -> torch.Tensor:
    """Of two vectors of ``hidden`` values one."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(hidden, 2 * hidden, generator=generator) / hidden**0.5).to(torch.bfloat16)


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)
