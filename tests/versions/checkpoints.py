# SPDX-License-Identifier: Apache-2.0
"""The forms in which MLA checkpoints are published: `quantization_config` as official config.json files have it."""

from dataclasses import dataclass, field
from typing import Any

LINEAR = ["Linear"]
FLOAT_8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT_8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT_4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def _compressed_tensors(
    layout: str, weights: dict[str, Any], activations: dict[str, Any] | None, ignore: tuple[str, ...] = ("lm_head",)
) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {"targets": LINEAR, "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True)
class Checkpoint:
    """A form of weights; `column`: where README's table has it; `capability`: of the GPU that it is meant for."""

    name: str
    column: str
    quantization: dict[str, Any] | None = field(default=None, hash=False)
    capability: tuple[int, int] = (9, 0)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return self.name


UNQUANTISED = Checkpoint("unquantised", "unquantised")

# DeepSeek-V3, -V3.1, -R1; Kimi-K2-Instruct; LongCat-Flash-Chat-FP8
FP8_BLOCK = Checkpoint(
    "FP8 block",
    "FP8 block",
    {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
)

# neuralmagic/DeepSeek-Coder-V2-Instruct-FP8
FP8_STATIC = Checkpoint(
    "FP8 static", "FP8 static", {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}
)

# RedHatAI's FP8-dynamic
FP8_TOKEN = Checkpoint(
    "FP8 W8A8 per token",
    "FP8 per token",
    _compressed_tensors(
        "float-quantized",
        FLOAT_8 | {"strategy": "channel", "dynamic": False},
        FLOAT_8 | {"strategy": "token", "dynamic": True},
    ),
)

FP8_TENSOR = Checkpoint(
    "FP8 W8A8 static",
    "FP8 static",
    _compressed_tensors(
        "float-quantized",
        FLOAT_8 | {"strategy": "tensor", "dynamic": False},
        FLOAT_8 | {"strategy": "tensor", "dynamic": False},
    ),
)

# meituan/DeepSeek-R1-Channel-INT8, RedHatAI's W8A8
INT8 = Checkpoint(
    "INT8 W8A8",
    "INT8 W8A8",
    _compressed_tensors(
        "int-quantized",
        INT_8 | {"strategy": "channel", "dynamic": False},
        INT_8 | {"strategy": "token", "dynamic": True},
    ),
)

# nvidia's FP8 builds
FP8_MODELOPT = Checkpoint(
    "FP8 ModelOpt",
    "FP8 static",
    {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                "targets": LINEAR,
            }
        },
        "ignore": ["lm_head"],
    },
)

INT4_ALL = Checkpoint("INT4 W4A16", "INT4", _compressed_tensors("pack-quantized", INT_4, None))

# moonshotai/Kimi-K2-Thinking: the routed experts only
INT4_EXPERTS = Checkpoint(
    "INT4 experts",
    "INT4",
    _compressed_tensors(
        "pack-quantized",
        INT_4,
        None,
        ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"),
    ),
)

# cognitivecomputations/DeepSeek-R1-AWQ, which its card serves with --dtype float16
AWQ = Checkpoint(
    "AWQ",
    "AWQ",
    {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    dtype="float16",
)

# OPEA's and ModelCloud's int4 builds of DeepSeek-R1
GPTQ = Checkpoint(
    "GPTQ",
    "GPTQ",
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {},
        # vLLM reads them from the weights' files, which there are none of.
        "modules_in_block_to_quantize": [["model.layers."]],
    },
)

# nvidia/DeepSeek-R1-NVFP4: the newer builds quantise attention's projections too
NVFP4_MODELOPT = Checkpoint(
    "NVFP4 ModelOpt",
    "NVFP4",
    {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "targets": LINEAR,
            }
        },
        "ignore": ["lm_head"],
    },
    (10, 0),
)

NVFP4_COMPRESSED = Checkpoint(
    "NVFP4 compressed-tensors",
    "NVFP4",
    _compressed_tensors("nvfp4-pack-quantized", NVFP4 | {"dynamic": False}, NVFP4 | {"dynamic": "local"}),
    (10, 0),
)

CHECKPOINTS = (
    UNQUANTISED,
    FP8_BLOCK,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_MODELOPT,
    FP8_TOKEN,
    INT8,
    INT4_ALL,
    INT4_EXPERTS,
    AWQ,
    GPTQ,
    NVFP4_MODELOPT,
    NVFP4_COMPRESSED,
)
