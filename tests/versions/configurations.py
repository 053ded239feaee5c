# SPDX-License-Identifier: Apache-2.0
"""What people switch on or off: engine arguments and variables, and which checkpoint forms meet which of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import checkpoints, environments
from .checkpoints import CHECKPOINTS, Checkpoint
from .models import DEEPSEEK_V3, Model, models_of


@dataclass(frozen=True)
class Configuration:
    """`compilation`: of `--compilation-config`; `arguments`: other fields of EngineArgs; `environ`: variables."""

    name: str
    compilation: dict[str, Any] = field(default_factory=dict, hash=False)
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    environ: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Case:
    """One whole model to trace."""

    model: Model
    checkpoint: Checkpoint
    configuration: Configuration

    def __str__(self) -> str:
        return f"{self.model}, {self.checkpoint}, {self.configuration}"


def _passes(name: str, **flags: bool) -> Configuration:
    return Configuration(name, {"pass_config": flags})


DEFAULT = Configuration("default")
NO_DEEP_GEMM = Configuration("no DeepGEMM", environ={"VLLM_USE_DEEP_GEMM": "0"})
LEVELS = tuple(Configuration(f"-O{level}", arguments={"optimization_level": level}) for level in (1, 3))
CUSTOM_OPS = tuple(
    Configuration(f"custom_ops {','.join(ops)}", {"custom_ops": ops})
    for ops in (["all"], ["none"], ["none", "+rms_norm"], ["none", "+quant_fp8"], ["none", "+rms_norm", "+quant_fp8"])
)
FLAGS = ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "eliminate_noops")
PASSES = (
    _passes("no passes", **dict.fromkeys(FLAGS, False)),
    _passes("all passes", **dict.fromkeys(FLAGS, True)),
    *(_passes(f"only {flag}", **{other: other == flag for other in FLAGS}) for flag in FLAGS),
)
PARTITION = Configuration("Inductor partition", {"use_inductor_graph_partition": True})
CACHES = tuple(Configuration(f"cache {dtype}", arguments={"kv_cache_dtype": dtype}) for dtype in ("fp8", "fp8_e5m2"))

# What the passes of vLLM meet differently; the others only change which kernel multiplies.
CROSSED = (
    checkpoints.UNQUANTISED,
    checkpoints.FP8_BLOCK,
    checkpoints.FP8_TENSOR,
    checkpoints.FP8_TOKEN,
    checkpoints.NVFP4_MODELOPT,
)


def cases(release: str) -> Iterator[Case]:
    """Everything that is traced of a release."""
    for checkpoint in CHECKPOINTS:
        yield Case(DEEPSEEK_V3, checkpoint, DEFAULT)
    yield Case(DEEPSEEK_V3, checkpoints.FP8_BLOCK, NO_DEEP_GEMM)
    for checkpoint in CROSSED:
        for configuration in (*LEVELS, *CUSTOM_OPS, *PASSES, PARTITION, *CACHES):
            yield Case(DEEPSEEK_V3, checkpoint, configuration)
