# SPDX-License-Identifier: Apache-2.0
"""What people switch on or off: engine arguments and variables, and which checkpoint forms meet which of them."""

from dataclasses import dataclass, field
from typing import Any

from . import checkpoints, environments, model_classes
from .checkpoints import CHECKPOINTS, Checkpoint
from .extent import CI_RELEASES, Extent
from .models import DEEPSEEK_MTP, DEEPSEEK_V3, MODELS, Model


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
NO_FLASHINFER = Configuration("no FlashInfer GEMM", environ={"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"})
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

COMPILE_SIZES = (1, 6)  # no other dimension of a model
SIZES = Configuration("compile_sizes", {"compile_sizes": list(COMPILE_SIZES)})
INVARIANT = Configuration("batch invariant", environ={"VLLM_BATCH_INVARIANT": "1"})
LORA = Configuration("LoRA", arguments={"enable_lora": True, "max_lora_rank": 16})
TENSOR_PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
TWO_GPUS = (
    Configuration("TP 2", arguments=TENSOR_PARALLEL),
    Configuration("TP 2, fuse_allreduce_rms", {"pass_config": {"fuse_allreduce_rms": True}}, TENSOR_PARALLEL),
    Configuration(
        "TP 2, sequence parallel",
        {"pass_config": {"enable_sp": True, "sp_min_token_num": 1}, "use_inductor_graph_partition": True},
        TENSOR_PARALLEL,
    ),
    Configuration(
        "TP 2, async TP",
        {
            "pass_config": {"enable_sp": True, "fuse_gemm_comms": True, "sp_min_token_num": 1},
            "use_inductor_graph_partition": True,
        },
        TENSOR_PARALLEL,
    ),
    Configuration("TP 2, decode context parallel", arguments=TENSOR_PARALLEL | {"decode_context_parallel_size": 2}),
    Configuration("TP 2, expert parallel", arguments=TENSOR_PARALLEL | {"enable_expert_parallel": True}),
)

# Whose norms or activations vLLM's passes fuse with a quantisation; the others only change which kernel multiplies.
CROSSED = (checkpoints.UNQUANTISED, checkpoints.FP8_TENSOR, checkpoints.FP8_TOKEN, checkpoints.NVFP4_MODELOPT)
MOST_DIFFERENT = (CUSTOM_OPS[0], CUSTOM_OPS[-1], *PASSES[:2], PARTITION)


POPULAR = (NO_DEEP_GEMM, CUSTOM_OPS[0], *PASSES[:2], PARTITION, CACHES[0], LORA, TWO_GPUS[1])


def cases() -> list[Case]:
    """Every whole model that is traced of some release."""
    everything = (NO_DEEP_GEMM, NO_FLASHINFER, *LEVELS, *CUSTOM_OPS, *PASSES, PARTITION, *CACHES, LORA, *TWO_GPUS)
    everything += (SIZES, INVARIANT)
    found = _forms() + _popular()
    found += [Case(DEEPSEEK_V3, checkpoints.FP8_BLOCK, each) for each in everything]
    found += [Case(DEEPSEEK_V3, checkpoint, each) for checkpoint in CROSSED for each in MOST_DIFFERENT]
    found += [Case(DEEPSEEK_V3, checkpoints.UNQUANTISED, each) for each in (*LEVELS, *CACHES, LORA, *TWO_GPUS)]
    found += [Case(DEEPSEEK_V3, checkpoints.FP8_TENSOR, each) for each in TWO_GPUS]
    found += [Case(DEEPSEEK_MTP, checkpoints.INT4_EXPERTS, DEFAULT)]
    return list(dict.fromkeys(found + _models()))


def cases_of(release: str, extent: Extent = Extent.ALL) -> list[Case]:
    """The cases of a release; most flags, and the model classes that it has, only of those that CI runs."""
    if extent is Extent.QUICK:
        # What people add to the most served form, and the forms that passes treat differently; each form elsewhere.
        crossed = [Case(DEEPSEEK_V3, checkpoint, DEFAULT) for checkpoint in (checkpoints.FP8_BLOCK, *CROSSED)]
        return crossed + _popular() if release == CI_RELEASES[0] else _forms()
    if release not in CI_RELEASES:
        return _forms() if extent is Extent.TABLE else _forms() + _popular()
    found = dict.fromkeys(_forms() + _models()) if extent is Extent.TABLE else cases()
    known = model_classes.architectures(environments.vllm_of(release))
    return [case for case in found if case.model.architecture in known]


def one_pass_cases(release: str, extent: Extent = Extent.ALL) -> dict[str, Case]:
    """Whose graphs get the plugin's pass after each single one of the release, by the name of the check."""
    if release not in CI_RELEASES or extent is Extent.TABLE:
        return {}
    found = (checkpoints.FP8_BLOCK, checkpoints.FP8_TENSOR)
    if extent is Extent.QUICK:
        found = (found[CI_RELEASES.index(release)],)
    return {f"one pass at a time, {each}": Case(DEEPSEEK_V3, each, DEFAULT) for each in found}


def _forms() -> list[Case]:
    """Each form of checkpoint, and a draft."""
    models = [Case(DEEPSEEK_V3, checkpoint, DEFAULT) for checkpoint in CHECKPOINTS]
    return [*models, Case(DEEPSEEK_MTP, checkpoints.FP8_BLOCK, DEFAULT)]


def _popular() -> list[Case]:
    return [Case(DEEPSEEK_V3, checkpoints.FP8_BLOCK, each) for each in POPULAR]


def _models() -> list[Case]:
    return [Case(model, checkpoints.UNQUANTISED, DEFAULT) for model in MODELS]
