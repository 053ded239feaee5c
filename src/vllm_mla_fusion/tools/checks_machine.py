# SPDX-License-Identifier: Apache-2.0
"""What the doctor looks at without vLLM: torch, GPUs, compilers, the kernel cache and the kernel."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator

from vllm_mla_fusion import __version__
from vllm_mla_fusion.jit import build, cache, device_compiler, host_compiler, prebuilt, target, toolchain
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.explain import SPACE_REMEDY
from vllm_mla_fusion.release import release
from vllm_mla_fusion.tools.check import Check, Status


def python() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", "ok", f"{version} ({sys.executable}), vllm-mla-fusion {__version__}")


def torch() -> Iterator[Check]:
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


def gpus() -> Iterator[Check]:
    backend = target.torch_backend()
    if backend == "cpu":
        yield Check("gpu", "ok", "none needed: this torch is built for the CPU")
        return
    found = target.visible_gpus(backend)
    for index, gpu in enumerate(found):
        yield Check("gpu", "ok", f"{index}: {gpu.name}, architecture {gpu.arch}")
    if not found:
        remedy = "On a GPU machine check nvidia-smi or rocminfo and CUDA_VISIBLE_DEVICES; in an image build, go on."
        yield Check("gpu", "note", "none visible to this process; vLLM's GPU builds do not start without one", remedy)
    driver = target.driver_version(backend)
    if driver:
        yield Check("driver", "ok", driver)
    elif found:
        yield Check("driver", "note", "version unknown")


def compilers() -> Iterator[Check]:
    wanted = target.detect_target()
    cxx, ninja = host_compiler.find_cxx(), toolchain.find_ninja()
    # A finished kernel needs no compiler, so a missing one is then worth a note only.
    missing: Status = "note" if is_built(wanted) else "problem"
    yield _cxx(cxx, missing)
    yield Check("ninja", "ok", str(ninja)) if ninja else Check("ninja", missing, "not found", toolchain.NINJA_REMEDY)
    if target.torch_backend() == "cpu":
        return
    label = "hipcc" if target.torch_backend() == "rocm" else "nvcc"
    try:
        toolkit = toolchain.find_toolkit(target.torch_backend())
    except BuildError as error:
        yield Check(label, missing if wanted.backend != "cpu" else "note", error.problem, error.remedy)
        return
    yield from _device_compiler(label, toolkit, wanted, cxx, missing)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        chosen = os.environ.get(name)
        if chosen and label == "nvcc" and toolkit.origin not in ("CUDA_HOME", name):
            remedy = f"Set {name} to {toolkit.home}, or unset it."
            yield Check(name, "note", f"{chosen} is no usable CUDA toolkit; {toolkit.home} is taken instead", remedy)


def _cxx(cxx: str | None, missing: Status) -> Check:
    if cxx is None:
        error = host_compiler.missing_cxx()
        return Check("c++", missing, error.problem, error.remedy)
    fault = host_compiler.compiler_fault(cxx)
    if fault:
        return Check("c++", missing, fault, "Mend what it names, or set CXX to a compiler that works.")
    return Check("c++", "ok", f"{cxx} (tried on an empty file)")


def _device_compiler(
    label: str, toolkit: toolchain.Toolkit, wanted: target.Target, cxx: str | None, missing: Status
) -> Iterator[Check]:
    found = f"{toolkit.compiler} (found by {toolkit.origin}"
    if wanted.backend == "cpu" or cxx is None or is_built(wanted):
        yield Check(label, "ok", f"{found})")
        return
    try:
        device_compiler.try_empty_kernel(toolkit.compiler, wanted, cxx)
    except BuildError as error:
        yield Check(label, missing, error.problem, error.remedy)
        return
    yield Check(label, "ok", f"{found}; tried on an empty kernel for {', '.join(wanted.archs)})")


def kernel_cache() -> Iterator[Check]:
    try:
        yield from _kernel_cache()
    except BuildError as error:
        if not _comes_with_the_wheel():
            raise
        yield Check("cache", "note", f"{error.problem} The wheel's kernel needs none.", error.remedy)


def _comes_with_the_wheel() -> bool:
    try:
        return prebuilt.find(target.detect_target())[0] is not None
    except BuildError:
        return False


def _kernel_cache() -> Iterator[Check]:
    root = cache.cache_dir()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if existing == root:
        cache.check_private(root)
    cache.check_executable(existing)
    # A finished kernel needs no room and no permission to write.
    status: Status = "note" if is_built(target.detect_target()) else "problem"
    free = shutil.disk_usage(existing).free // 2**20
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Check("cache", status, f"{existing} cannot be written", cache.OTHER_DIR)
    elif free < cache.BUILD_MEGABYTES:
        detail = f"{root}: only {free} MB free, a build takes up to {cache.BUILD_MEGABYTES}"
        yield Check("cache", status, detail, SPACE_REMEDY)
    else:
        yield Check("cache", "ok", f"{root}{'' if existing == root else ' (not created yet)'}")


def kernel() -> Iterator[Check]:
    wanted = target.detect_target()
    if target.lacks_gpu():
        built = ", ".join(str(each) for each in build.built_targets() if is_built(each)) or "nothing"
        unknown = "no GPU tells which architecture is needed"
        brought, why_not = prebuilt.find(target.Target("cpu"))
        if brought:
            yield Check(
                "kernel", "ok", f"{unknown}; the wheel brings {', '.join(prebuilt.archs())}; built so far: {built}"
            )
            return
        if prebuilt.FOLDER.exists():
            yield Check("kernel", "note", f"the wheel's own is passed over: {why_not}")
        yield Check("kernel", "note", f"{unknown}; built so far: {built}", f"For an image: {target.BUILD_AHEAD}")
        return
    yield from _unserved_gpus(wanted)
    brought, why_not = prebuilt.find(wanted)
    if brought:
        yield Check("kernel", "ok", f"the wheel brings one for {wanted}: {brought}")
        return
    if prebuilt.FOLDER.exists():
        yield Check("kernel", "note", f"the wheel's own is passed over, one is built instead: {why_not}")
    if build.is_built(wanted):
        yield Check("kernel", "ok", f"built for {wanted}: {build.library_path(wanted)}")
        return
    try:
        toolchain.find_toolchain(wanted.backend)
    except BuildError:
        yield Check("kernel", "note", f"not built for {wanted}", "First get what is missing above.")
        return
    yield Check("kernel", "ok", f"not built yet for {wanted}; the first start does it, or now: vllm-mla-fusion build")


def _unserved_gpus(wanted: target.Target) -> Iterator[Check]:
    """The workers on these would run as stock vLLM: MLA_FUSION_ARCH leaves their architecture out."""
    backend = target.torch_backend()
    archs = sorted({gpu.arch for gpu in target.visible_gpus(backend)})
    unserved = [arch for arch in archs if not target.serves(wanted, arch)]
    if unserved:
        detail = f"the kernel for {wanted} does not run on the GPUs of architecture {', '.join(unserved)}"
        remedy = f"Unset MLA_FUSION_ARCH, or set it to {','.join(archs)}."
        yield Check("kernel", "problem", detail, remedy)


def is_built(wanted: target.Target) -> bool:
    """Whether a finished kernel is there; what keeps it from being found is reported by the check of the kernel."""
    try:
        return prebuilt.find(wanted)[0] is not None or build.is_built(wanted)
    except BuildError:
        return False
