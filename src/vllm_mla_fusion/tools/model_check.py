# SPDX-License-Identifier: Apache-2.0
"""Tells from a model's config alone whether it has MLA layers and whether they would fuse."""

from dataclasses import dataclass
from typing import Any, Literal

DSA = (
    "sparse attention (DSA, index_topk): fuses with use_inductor_graph_partition=True where vLLM compiles the model "
    "from its MLA wrapper (older releases); else its indexer stands between RoPE and the KV-cache write, or vLLM has a "
    "fused kernel of its own; start it with MLA_FUSION=1 and read its report"
)
NOPE = "its MLA layers use no RoPE, so there is nothing to fuse with the KV-cache write"
OWN_WRITER = "its attention writes the KV cache by kernels of its own, in a layout of its own"
NO_MLA_IN_VLLM = "it has kv_lora_rank, but vLLM runs it with ordinary attention instead of MLA"
NOT_LISTED = "vLLM does not list its model type as MLA, so the cache write stays outside the compiled graphs"

SPARSE = {"deepseek_v32", "glm_moe_dsa"}
# model_type of the text config -> why vLLM's layers of that model cannot fuse.
STOCK_BECAUSE = {
    "deepseek_v4": OWN_WRITER,
    "deepseek_v41": OWN_WRITER,
    "dots3_note": OWN_WRITER,
    "hy_v4": OWN_WRITER,
    "kimi_linear": NOPE,
    "kimi_k3": NOPE,
    "glm5_next": NOPE,
    "glm5_next_text": NOPE,
    "minicpm3": NO_MLA_IN_VLLM,
    "sarvam_mla": NOT_LISTED,
}
FUSES = {
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_k2",
    "longcat_flash",
    "longcat_flash_ngram",
    "pangu_ultra_moe",
}


@dataclass(frozen=True)
class ModelCheck:
    """What a config says.

    Args:
        model_type: ``model_type`` of the (text) config.
        has_mla: Whether vLLM runs it with MLA layers.
        fuses: ``"yes"``, ``"no"``, or ``"unknown"`` if the config alone does not tell.
        detail: Geometry if it fuses, else the reason or the condition.
    """

    model_type: str
    has_mla: bool
    fuses: Literal["yes", "no", "unknown"]
    detail: str


def judge(config: dict[str, Any]) -> ModelCheck:
    """Judges the config of the language model."""
    model_type = str(config.get("model_type", "unknown"))
    reason = STOCK_BECAUSE.get(model_type)
    rank, rope_dim = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if reason == NO_MLA_IN_VLLM:
        return ModelCheck(model_type, False, "no", reason)
    if not rank and reason is None:
        return ModelCheck(model_type, False, "no", "no MLA layers: the config has no kv_lora_rank")
    if reason is None and (model_type in SPARSE or config.get("index_topk")):
        return ModelCheck(model_type, True, "unknown", DSA)
    if reason is None and not rope_dim:
        reason = NOPE
    if reason:
        return ModelCheck(model_type, True, "no", reason)
    geometry = f"kv_lora_rank {rank}, qk_rope_head_dim {rope_dim}, {_layers(config, model_type)}"
    if model_type not in FUSES:
        detail = f"{geometry}; model type not known to this version: start it with MLA_FUSION=1 and read its report"
        return ModelCheck(model_type, True, "unknown", detail)
    return ModelCheck(model_type, True, "yes", geometry)


def _layers(config: dict[str, Any], model_type: str) -> str:
    count = config.get("num_hidden_layers") or config.get("num_layers")
    if not isinstance(count, int):
        return "number of layers not in the config"
    if model_type.startswith("longcat_flash"):
        return f"{2 * count} MLA layers (2 in each of {count} blocks)"
    if model_type == "bailing_hybrid":
        return f"some of {count} layers are MLA"
    return f"{count} MLA layers"
