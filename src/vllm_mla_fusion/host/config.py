# SPDX-License-Identifier: Apache-2.0
"""What a finished VllmConfig says about MLA and about its graphs. Changes nothing."""

from __future__ import annotations

from typing import Any

from vllm_mla_fusion.host import support
from vllm_mla_fusion.host.layers import layer_names_are_inputs
from vllm_mla_fusion.host.support import UPDATE_OP


def is_mla_model(vllm_config: Any) -> bool:
    """Whether the target model's attention is MLA."""
    return vllm_config.model_config is not None and bool(vllm_config.model_config.use_mla)


def not_compiled_reason(vllm_config: Any) -> str | None:
    """Why vLLM runs this configuration without post-grad passes; None if it has them."""
    config = vllm_config.compilation_config
    compilation = mode(config)
    if compilation == "NONE":
        return "vLLM does not compile this model (enforce_eager, -O0, or a model that it never compiles)"
    if config.backend not in ("", "inductor"):
        return f"compilation backend {config.backend!r} has no post-grad passes"
    if compilation != "VLLM_COMPILE" and not support.platform().is_cpu():
        return f"compilation mode {compilation} has no vLLM pass manager"
    return None


def mode(compilation_config: Any) -> str:
    """The name of the compilation mode."""
    return getattr(compilation_config.mode, "name", str(compilation_config.mode))


def has_mla_graphs(vllm_config: Any) -> bool:
    """Whether the target model has MLA layers in graphs that vLLM's passes see."""
    return is_mla_model(vllm_config) and not_compiled_reason(vllm_config) is None


def config_problem(vllm_config: Any) -> str | None:
    """Why the cache update may not become part of a compiled graph; None if it may."""
    if getattr(vllm_config.parallel_config, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism gathers the latents on the host before they are cached"
    if getattr(getattr(vllm_config, "attention_config", None), "hisparse_config", None) is not None:
        return "HiSparse redirects the cache write on the host"
    if getattr(getattr(vllm_config, "cache_config", None), "calculate_kv_scales", False):
        return (
            "--calculate-kv-scales measures the rotated query and the latent after RoPE and before the cache write, "
            "which are one kernel here; start vLLM without it: with a checkpoint that has scales, or with scale 1.0"
        )
    return _layer_name_problem(vllm_config.compilation_config)


def _layer_name_problem(compilation_config: Any) -> str | None:
    """Graphs of vLLM's Dynamo partition are compiled once for all layers unless the layer's name is a part of them."""
    is_one_graph = getattr(compilation_config, "use_inductor_graph_partition", False)
    if mode(compilation_config) != "VLLM_COMPILE" or is_one_graph or layer_names_are_inputs():
        return None
    return (
        "layer names are constants of the graphs (VLLM_USE_LAYERNAME=0, or a torch older than 2.11), so that with the "
        "cache update in them each layer would be compiled by itself, in about 13 times the time; unset "
        "VLLM_USE_LAYERNAME"
    )


def update_problem(vllm_config: Any) -> str | None:
    """Why vLLM's passes will not see the cache update; None if they will."""
    if UPDATE_OP in (vllm_config.compilation_config.splitting_ops or []):
        return f"splitting_ops were set explicitly and contain {UPDATE_OP}; remove it from them"
    return None
