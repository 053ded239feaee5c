# SPDX-License-Identifier: Apache-2.0
"""Two MLA layers of the installed vLLM, built by its own code for a config of one of the variants."""

import json
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import deepseek_scaling_rope
from vllm.model_executor.models import deepseek_v2, registry
from vllm.utils.torch_utils import set_default_torch_dtype

from .variants import GEOMETRIES, Variant

NUM_LAYERS = 2
MAX_MODEL_LEN = 1024

# original_max_position_embeddings and beta
LLAMA_4_SCALING = (8, 0.1)

HF_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": NUM_LAYERS,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": MAX_MODEL_LEN,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "vocab_size": 1024,
    "first_k_dense_replace": NUM_LAYERS,
}


def vllm_config(variant: Variant, folder: Path) -> VllmConfig:
    """The config of an engine that serves the variant's model; `folder` receives the model's config.json."""
    geometry = GEOMETRIES[variant.geometry]
    hf_config = HF_CONFIG | geometry
    hf_config["num_key_value_heads"] = geometry["num_attention_heads"]
    hf_config["rope_parameters"] = variant.rope.parameters
    hf_config["llama_4_scaling"] = LLAMA_4_SCALING if variant.llama_4_scaling else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_dtype=variant.cache_dtype,
        compilation_config={
            "custom_ops": ["+rotary_embedding"] if variant.rope.custom_op else [],
            "use_inductor_graph_partition": variant.inductor_partition,
            "inductor_compile_config": {"benchmark_combo_kernel": False},  # there is nothing to benchmark on
        },
    )
    # vLLM looks at a model class in a process of its own, which would have to import it all again.
    with patch.object(registry, "_run_in_subprocess", lambda look: look()):
        return arguments.create_engine_config()


def init_single_process(config: VllmConfig, rendezvous: Path) -> None:
    """A world of one process, as a worker sets it up, over gloo."""
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class Layers(torch.nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        index_topk = getattr(hf_config, "index_topk", None)
        indices = {} if index_topk is None else {"topk_indices_buffer": torch.empty(MAX_MODEL_LEN, index_topk).int()}
        self.layers = torch.nn.ModuleList(
            deepseek_v2.DeepseekV2MLAAttention(
                vllm_config=vllm_config,
                config=hf_config,
                hidden_size=hf_config.hidden_size,
                num_heads=hf_config.num_attention_heads,
                qk_nope_head_dim=hf_config.qk_nope_head_dim,
                qk_rope_head_dim=hf_config.qk_rope_head_dim,
                v_head_dim=hf_config.v_head_dim,
                q_lora_rank=hf_config.q_lora_rank,
                kv_lora_rank=hf_config.kv_lora_rank,
                max_position_embeddings=hf_config.max_position_embeddings,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}model.layers.{index}.self_attn",
                **indices,
            )
            for index in range(hf_config.num_hidden_layers)
        )

        self.llama_4_scaling = hf_config.llama_4_scaling

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query_scale = None
        if self.llama_4_scaling is not None:
            query_scale = deepseek_v2._get_llama_4_scaling(*self.llama_4_scaling, positions)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, query_scale)
        return hidden_states


def build(config: VllmConfig, variant: Variant, mode: FakeTensorMode) -> torch.nn.Module:
    """The layers, with fake weights on a GPU. No stock MLA model pairs neox-wise, so that is asked of `get_rope`."""

    def get_rope(*args: object, **kwargs: object) -> torch.nn.Module:
        return stock_get_rope(*args, **kwargs | {"is_neox_style": variant.is_neox})

    stock_get_rope = deepseek_v2.get_rope
    rotary_embedding._ROPE_DICT.clear()  # vLLM keeps one module per set of parameters, whatever config it was built for
    with (
        patch.object(deepseek_v2, "get_rope", get_rope),
        patch.object(deepseek_scaling_rope, "has_flashinfer", lambda: True),
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        mode,
        torch.device("cuda"),
    ):
        return Layers(vllm_config=config)
