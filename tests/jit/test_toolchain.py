# SPDX-License-Identifier: Apache-2.0
"""Finding GPUs and compilers: every layout of a toolkit as a small tree of files, every driver answer as data."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.jit import compiling, resources, target, toolchain
from vllm_mla_fusion.jit.build import BuildError, Target, detect_target
from vllm_mla_fusion.jit.target import Gpu, parse_arch
from vllm_mla_fusion.jit.toolchain import Toolchain, find_cuda

H100, A100, B200 = Gpu("GPU-aa11", "9.0", "H100"), Gpu("GPU-ab22", "8.0", "A100"), Gpu("GPU-cc33", "10.0", "B200")


def toolkit(home: Path, version: int = 13000, libcudart: str = "lib64/libcudart.so") -> Path:
    """The files that make a directory a CUDA toolkit."""
    for name in ("bin/nvcc", "include/cuda_runtime.h", "include/cuda_runtime_api.h", libcudart):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("")
    (home / "include/cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    (home / "bin/nvcc").write_text("#!/bin/sh\nexit 9\n")
    (home / "bin/nvcc").chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No toolkit anywhere, an empty PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_HOME", "ROCM_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "MLA_FUSION_ARCH", "CC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOME", tmp_path / "absent")
    monkeypatch.setattr(toolchain, "DEFAULT_ROCM_HOME", tmp_path / "absent")
    monkeypatch.setattr(toolchain, "_wheel_files", lambda distribution: [])
    monkeypatch.setattr(target, "KFD_NODES", tmp_path / "kfd")


# ---- CUDA toolkits --------------------------------------------------------------------------------------------------


def test_cuda_home_wins_over_nvcc_on_path(tmp_path, monkeypatch):
    chosen, other = toolkit(tmp_path / "chosen"), toolkit(tmp_path / "other")
    (tmp_path / "bin/nvcc").symlink_to(other / "bin/nvcc")
    assert find_cuda("13.0").home == other
    monkeypatch.setenv("CUDA_HOME", str(chosen))
    assert find_cuda("13.0").home == chosen
    assert find_cuda("13.0").origin == "CUDA_HOME"


def test_a_wrapper_of_nvcc_is_asked_for_the_real_toolkit(tmp_path):
    real = toolkit(tmp_path / "cuda-13.0")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.write_text(f"#!/bin/sh\necho '#$ _HERE_={real}/bin' >&2\n")
    wrapper.chmod(0o755)
    assert find_cuda("13.0").home == real


def test_default_location_and_pip_come_last(tmp_path, monkeypatch):
    pip = toolkit(tmp_path / "site/nvidia/cu13", libcudart="lib/libcudart.so.13")
    monkeypatch.setattr(toolchain, "_wheel_files", lambda distribution: [pip / "bin/nvcc"])
    found = find_cuda("13.0")
    assert (found.home, found.from_pip) == (pip, True)
    default = toolkit(tmp_path / "usr-local-cuda")
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOME", default)
    assert find_cuda("13.0").home == default


def test_a_broken_cuda_home_gives_way_and_every_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOME", toolkit(tmp_path / "cuda-12", version=12080))
    with pytest.raises(BuildError) as failure:
        find_cuda("13.0")
    message = str(failure.value)
    assert "nowhere): has no bin/nvcc" in message
    assert "is CUDA 12, torch is built for CUDA 13.0" in message
    assert "pip install -U 'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*'" in message
    fitting = toolkit(tmp_path / "cuda-13")
    (tmp_path / "bin/nvcc").symlink_to(fitting / "bin/nvcc")
    assert find_cuda("13.0").home == fitting


def test_pip_toolkit_gets_its_two_fixes(tmp_path):
    home = toolkit(tmp_path / "cu13", libcudart="lib/libcudart.so.13")
    tools = Toolchain("/usr/bin/g++", Path("ninja"), toolchain.Toolkit(home, home / "bin/nvcc", "pip nvidia-cuda-nvcc"))
    (flag,) = compiling._runtime_link(tmp_path, tools)
    assert (Path(flag.removeprefix("-L")) / "libcudart.so").resolve() == home / "lib/libcudart.so.13"
    assert compiling._toolkit_flags(tmp_path, tools) == ["-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK"]


def test_pip_parts_that_do_not_fit_together(tmp_path, monkeypatch):
    versions = {"nvidia-cuda-nvcc": "13.0.88", "nvidia-nvvm": "13.5.37", "nvidia-cuda-crt": "13.5.37"}
    home = toolkit(tmp_path / "cu13", libcudart="lib/libcudart.so.13")
    monkeypatch.setattr(toolchain, "_wheel_files", lambda distribution: [home / "bin/nvcc"])
    monkeypatch.setattr(toolchain, "_wheel_version", versions.get)
    with pytest.raises(BuildError, match=r"do not fit together: nvidia-cuda-nvcc 13\.0\.88, nvidia-nvvm 13\.5\.37"):
        find_cuda("13.0")
    versions["nvidia-cuda-nvcc"] = "13.5.40"
    assert find_cuda("13.0").home == home


def test_a_system_toolkit_needs_no_fixes(tmp_path):
    home = toolkit(tmp_path / "cuda")
    tools = Toolchain("ccache g++", Path("ninja"), toolchain.Toolkit(home, home / "bin/nvcc", "CUDA_HOME"))
    assert compiling._runtime_link(tmp_path, tools) == []
    assert compiling._toolkit_flags(tmp_path, tools) == []


def test_machine_code_only_for_the_given_architectures():
    flags = compiling.device_flags(Target("cuda", ("9.0", "10.0")))
    assert [flag for flag in flags if "arch" in flag] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
    ]
    assert "-DMLA_FUSION_GPU" in compiling.cxx_flags(Target("cuda", ("9.0",)))
    assert "-DMLA_FUSION_GPU" not in compiling.cxx_flags(Target("cpu"))


def test_rocm(tmp_path, monkeypatch):
    with pytest.raises(BuildError, match="Install ROCm, or set ROCM_HOME"):
        toolchain.find_rocm()
    hipcc = tmp_path / "rocm/bin/hipcc"
    hipcc.parent.mkdir(parents=True)
    hipcc.write_text("")
    hipcc.chmod(0o755)
    monkeypatch.setenv("ROCM_HOME", str(tmp_path / "rocm"))
    found = toolchain.find_rocm()
    environment = compiling._child_environment(
        tmp_path, Target("rocm", ("gfx90a", "gfx942")), Toolchain("c++", tmp_path / "ninja", found)
    )
    assert environment["PYTORCH_ROCM_ARCH"] == "gfx90a;gfx942"
    assert environment["ROCM_HOME"] == str(tmp_path / "rocm")
    assert "-DUSE_ROCM" in compiling.device_flags(Target("rocm", ("gfx942",)))


def test_signature_sees_a_replaced_compiler(tmp_path, monkeypatch):
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    before = toolchain.signature("cuda")
    assert toolchain.signature("cuda") == before
    (home / "bin/nvcc").write_text("another compiler")
    assert toolchain.signature("cuda") != before


# ---- targets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_torch(monkeypatch):
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "_nvml_gpus", lambda: [H100, A100])


@pytest.mark.parametrize(
    ("visible", "order", "archs"),
    [
        (None, None, ("8.0", "9.0")),
        ("0", "PCI_BUS_ID", ("9.0",)),
        ("1", "PCI_BUS_ID", ("8.0",)),
        ("1,0", "PCI_BUS_ID", ("8.0", "9.0")),
        ("1", None, ("8.0", "9.0")),  # the default order is unknown here: both
        ("GPU-aa11", None, ("9.0",)),
        ("GPU-ab", None, ("8.0",)),
        ("MIG-x", None, ("8.0", "9.0")),
        ("1,7,0", "PCI_BUS_ID", ("8.0",)),  # CUDA ignores what follows an invalid entry
        ("", None, ()),
        ("-1", "PCI_BUS_ID", ()),
    ],
)
def test_visible_devices(cuda_torch, monkeypatch, visible, order, archs):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert detect_target() == (Target("cuda", archs) if archs else Target("cpu"))


def test_no_gpu_and_cpu_torch_give_the_cpu_target(monkeypatch):
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "_nvml_gpus", list)
    assert detect_target() == Target("cpu")
    monkeypatch.setattr(target, "torch_backend", lambda: "cpu")
    assert detect_target() == Target("cpu")


# A driver with one H100, and CUDA's own library, which ends the process that initialises it.
DRIVER = """
#include <stdlib.h>
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = 0; return index != 0; }
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetUUID(void *gpu, char *uuid, unsigned size) { strcpy(uuid, "GPU-aa11"); return 0; }
int nvmlDeviceGetName(void *gpu, char *name, unsigned size) { strcpy(name, "H100"); return 0; }
int cuInit(unsigned flags) { abort(); }
"""
DETECT = """
import torch
from vllm_mla_fusion.jit.target import detect_target
torch.version.cuda, torch.version.hip = "13.0", None
print(detect_target(), "libcuda" in open("/proc/self/maps").read(), torch.cuda.is_initialized())
"""


def test_detection_starts_no_cuda(tmp_path):
    """The real path through NVML in a process of its own, where CUDA could be had."""
    for name in ("libnvidia-ml.so.1", "libcuda.so.1"):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / name)]
        subprocess.run(command, input=DRIVER, text=True, check=True, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", DETECT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cuda-9.0", "False", "False"]


def test_nvml_absent_is_no_error(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert target._nvml_gpus() == []
    assert target.driver_version("cuda") is None


def pretend_amd_gpus(tmp_path, monkeypatch, *versions: int) -> None:
    """The kernel driver's nodes with these `gfx_target_version`s; 0 is a CPU."""
    for node, version in enumerate(versions):
        folder = tmp_path / "kfd" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"cpu_cores_count 4\ngfx_target_version {version}\nunique_id 77\n")
    monkeypatch.setattr(target, "torch_backend", lambda: "rocm")


def test_amd_gpus_by_sysfs(tmp_path, monkeypatch):
    pretend_amd_gpus(tmp_path, monkeypatch, 0, 90402, 90010, 90500, 110000)
    assert [gpu.arch for gpu in target.visible_gpus("rocm")] == ["gfx942", "gfx90a", "gfx950", "gfx1100"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert detect_target() == Target("cpu")


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"HIP": "2"}, 1),
        ({"CUDA": "2,3"}, 2),
        ({"HIP": "2,3", "CUDA": "2,3"}, 2),  # vLLM sets both, and HIP reads one
        ({"ROCR": "1,2,3", "HIP": "2", "CUDA": "2"}, 1),  # of those that ROCR leaves
        ({"ROCR": "1,2", "HIP": "2"}, 0),
    ],
)
def test_visible_amd_gpus(variables: dict[str, str], count: int, tmp_path, monkeypatch):
    pretend_amd_gpus(tmp_path, monkeypatch, 0, *[90402] * 4)
    for name, value in variables.items():
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
    assert len(target.visible_gpus("rocm")) == count


def forget_kernel() -> None:
    for remembered in (kernel.loading_failure, kernel._misfit, kernel._first_chosen_arch):
        remembered.cache_clear()


@pytest.mark.parametrize(
    ("backend", "archs", "gpus", "fits"),
    [
        ("cuda", ["9.0"], ["9.0"], True),
        ("cuda", ["8.0"], ["8.9"], True),
        ("cuda", ["8.9"], ["8.0"], False),
        ("cuda", ["9.0"], ["8.0"], False),
        ("cuda", ["10.0", "9.0"], ["9.0"], True),
        ("cuda", ["9.0"], [], True),  # the driver lists none: nothing speaks against it
        ("cuda", [], ["9.0"], False),
        ("cuda", [], [], False),
        ("rocm", ["gfx942"], ["gfx942"], True),
        ("rocm", ["gfx90a"], ["gfx942"], False),
        ("cpu", [], [], True),
    ],
)
def test_a_kernel_that_runs_on_no_gpu_is_not_available(backend, archs, gpus, fits, monkeypatch):
    """A server would stop at the first call of its op."""
    monkeypatch.setattr(target, "torch_backend", lambda: backend)
    monkeypatch.setattr(target, "visible_gpus", lambda _: [target.Gpu("", arch, "") for arch in gpus])
    monkeypatch.setattr(kernel, "load", lambda: Target(backend if archs else "cpu", tuple(archs)))
    forget_kernel()
    try:
        reason = kernel.failure()
    finally:
        forget_kernel()
    assert reason is None if fits else "The kernel does not fit: it is for" in reason and "MLA_FUSION_ARCH" in reason


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_each_worker_judges_by_the_device_that_it_uses(backend, monkeypatch):
    """Two kinds of GPUs and a library for one of them: a worker on the other would stop at its first launch."""
    archs = {"cuda": ("8.0", "9.0"), "rocm": ("gfx90a", "gfx942")}[backend]
    monkeypatch.setattr(target, "torch_backend", lambda: backend)
    monkeypatch.setattr(target, "visible_gpus", lambda _: [Gpu("", arch, "") for arch in archs])
    monkeypatch.setattr(kernel, "load", lambda: Target(backend, archs[:1]))
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: bool(chosen))
    monkeypatch.setattr("torch.cuda.current_device", lambda: chosen[-1])

    def properties(index):
        if backend == "rocm":
            return SimpleNamespace(gcnArchName=f"{archs[index]}:sramecc+:xnack-")
        major, minor = map(int, archs[index].split("."))
        return SimpleNamespace(major=major, minor=minor)

    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    for device, fits in ((0, True), (1, False)):
        forget_kernel()
        chosen.clear()
        assert kernel.failure() is None, "who only prepares the workers cannot know"
        chosen.append(device)
        reason = kernel.failure()
        assert reason is None if fits else f"this worker's GPU is {archs[1]}" in reason
        chosen.append(1 - device)
        assert kernel.failure() == reason, "another thread may be on another device"
    forget_kernel()


def test_arch_override(cuda_torch, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_ARCH", "10.0, 9.0")
    assert detect_target() == Target("cuda", ("10.0", "9.0"))
    monkeypatch.setenv("MLA_FUSION_ARCH", "cpu")
    assert detect_target() == Target("cpu")
    monkeypatch.setenv("MLA_FUSION_ARCH", "hopper")
    with pytest.raises(BuildError, match=r"MLA_FUSION_ARCH: Unknown architecture 'hopper'(?s:.*)9\.0 \(H100\)"):
        detect_target()
    monkeypatch.setenv("MLA_FUSION_ARCH", "9.0a")
    with pytest.raises(BuildError, match=r"MLA_FUSION_ARCH: Architecture '9\.0a' has a suffix(?s:.*)Give 9\.0\."):
        detect_target()
    with pytest.raises(BuildError, match="needs a torch built for rocm"):
        parse_arch("gfx942")


# ---- ptxas ----------------------------------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : Compiling entry function '_Z4fastPf' for 'sm_90'
ptxas info    : Function properties for _Z4fastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_registers_and_spills_are_read_from_the_log():
    fast, slow = resources.kernel_resources(PTXAS)
    assert (fast.name, fast.arch, fast.registers, fast.stack, fast.spills) == ("_Z4fastPf", "sm_90", 24, 0, 0)
    assert (slow.registers, slow.stack, slow.spills) == (255, 16, 20)
    assert resources.summary(PTXAS) == "2 kernels, at most 255 registers, 1 spill or use local memory: _Z4slowPf"
    assert resources.summary("c++ only") is None


def test_ninja_and_compiler_are_searched(tmp_path, monkeypatch):
    assert toolchain.find_cxx() is None
    (tmp_path / "bin/g++").symlink_to(shutil.which("true", path="/usr/bin:/bin"))
    assert toolchain.find_cxx() == str(tmp_path / "bin/g++")
    monkeypatch.setenv("CXX", "g++ -m64")
    assert toolchain.find_cxx() == "g++ -m64"


@pytest.mark.parametrize(
    ("version", "is_refused"), [("2.10.1+rocm7", True), ("2.11.0a0+git", False), ("2.11.0", False), ("3.0", False)]
)
def test_torch_that_is_too_old(version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(toolchain, "find_cxx", lambda: "c++")
    monkeypatch.setattr(toolchain, "find_ninja", lambda: Path("ninja"))
    refusal = pytest.raises(BuildError, match=r"torch 2\.11 or newer is needed .* found 2\.10\.1\+rocm7")
    with refusal if is_refused else contextlib.nullcontext():
        toolchain.find_toolchain("cpu")
