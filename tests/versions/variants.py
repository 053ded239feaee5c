# SPDX-License-Identifier: Apache-2.0
"""What is traced on every release: each form in which a stock MLA layer reaches the pass."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from .extent import CI_RELEASES, Extent
from .models import YARN

GEOMETRIES: dict[str, dict[str, Any]] = {
    "V2-Lite": {"hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None},
    "V3": {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536},
}
# DeepSeek-V3.2: an indexer beside each layer chooses what it attends to.
GEOMETRIES["V3.2"] = {
    **GEOMETRIES["V3"],
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
}


@dataclass(frozen=True)
class Rope:
    """A RoPE of the model and the form in which vLLM puts it into the graph."""

    name: str
    parameters: dict[str, Any]
    custom_op: str | None = None


ROPES = (
    Rope("default native", {"rope_type": "default", "rope_theta": 10000.0}),
    Rope("default _C op", {"rope_type": "default", "rope_theta": 10000.0}, "_C::rotary_embedding"),
    Rope("YaRN native", YARN),
    Rope("YaRN FlashInfer op", YARN, "vllm::flashinfer_rotary_embedding"),
)


@dataclass(frozen=True)
class Variant:
    geometry: str
    rope: Rope
    is_neox: bool
    cache_dtype: str
    inductor_partition: bool = False
    llama_4_scaling: bool = False

    def __str__(self) -> str:
        pairing = "neox" if self.is_neox else "GPT-J"
        partition = "Inductor partition" if self.inductor_partition else "Dynamo partition"
        scaling = ", llama_4_scaling" if self.llama_4_scaling else ""
        return f"{self.geometry}, {self.rope.name}, {pairing}, cache {self.cache_dtype}, {partition}{scaling}"


def all_variants() -> list[Variant]:
    """Every combination under vLLM's default partition; what changes the rest of the graph once per form of RoPE."""
    variants = [Variant(*axes) for axes in product(("V2-Lite", "V3"), ROPES, (False, True), ("auto", "fp8"))]
    variants += [Variant("V3", rope, False, "auto", inductor_partition=True) for rope in ROPES]
    return variants + [Variant("V3", rope, False, "auto", llama_4_scaling=True) for rope in ROPES]


def variants_of(release: str, extent: Extent) -> list[Variant]:
    """Those of a release: all, or the half that has every two of these choices together; the releases that CI runs have
    one half each."""
    if extent is Extent.ALL:
        return all_variants()
    odd = extent is Extent.QUICK and release == CI_RELEASES[0]

    def is_odd(each: Variant) -> bool:
        return (each.geometry == "V3") ^ each.is_neox ^ (each.cache_dtype == "fp8") ^ each.inductor_partition

    return [each for each in all_variants() if is_odd(each) == odd]


# The default partition has a piece of its own for the indexer, between RoPE and the cache update.
SPARSE = Variant("V3.2", ROPES[2], False, "fp8_ds_mla", inductor_partition=True)

# In this form a key that was rotated in place would be copied for attention.
IN_PLACE = Variant("V3", ROPES[2], False, "auto", inductor_partition=True)
IN_PLACE_NAME = f"counter-proof: k_pe in place, {IN_PLACE}"
