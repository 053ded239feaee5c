# SPDX-License-Identifier: Apache-2.0
"""Models for whole engines beside tiny-mla itself."""

from __future__ import annotations

import json
from pathlib import Path

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


def llama(folder: Path) -> str:
    """A model without MLA, as a config only: start it with `load_format="dummy"`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def tiny_mla_with_mtp(folder: Path) -> str:
    """tiny-mla and a multi-token-prediction layer: a copy of its last layer behind a random mixture of its inputs."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    # As many dense layers as there are now: the prediction layer shall have the MLP of the one that it copies.
    config |= {"num_nextn_predict_layers": 1, "first_k_dense_replace": layers + 1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "model.safetensors")
    last, prediction = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {prediction + name.removeprefix(last): value for name, value in weights.items() if name.startswith(last)}
    torch.manual_seed(0)
    mixture = torch.randn(hidden, 2 * hidden) / hidden**0.5
    extra |= {
        f"{prediction}eh_proj.weight": mixture.to(torch.bfloat16),
        f"{prediction}enorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prediction}hnorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prediction}embed_tokens.weight": weights["model.embed_tokens.weight"],
        f"{prediction}shared_head.norm.weight": weights["model.norm.weight"],
        f"{prediction}shared_head.head.weight": weights["lm_head.weight"],
    }
    save_file({name: value.clone() for name, value in (weights | extra).items()}, folder / "model.safetensors")
    return str(folder)
