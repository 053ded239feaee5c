# SPDX-License-Identifier: Apache-2.0
"""What to build for: found without initialising CUDA or HIP in this process."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_mla_fusion.jit.errors import BuildError

Backend = Literal["cpu", "cuda", "rocm"]

AMDGPU_VERSION = Path("/sys/module/amdgpu/version")
BUILD_AHEAD = "vllm-mla-fusion build --arch 9.0    # H100; for others 8.0 (A100), 10.0 (B200), gfx942 (MI300), ..."
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


@dataclass(frozen=True)
class Target:
    """One kernel library.

    Args:
        backend: ``"cpu"``, ``"cuda"`` or ``"rocm"``.
        archs: Compute capabilities such as ``("9.0",)`` for cuda, gfx names such as ``("gfx942",)`` for rocm,
            empty for cpu.
    """

    backend: Backend
    archs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.backend, *self.archs))


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver lists it: its identifier, architecture (``"9.0"``, ``"gfx942"``) and product name."""

    uuid: str
    arch: str
    name: str


def torch_backend() -> Backend:
    """The backend the installed torch was built for."""
    import torch

    if torch.version.hip:
        return "rocm"
    return "cuda" if torch.version.cuda else "cpu"


def parse_arch(text: str) -> Target:
    """Reads ``9.0``, ``gfx942``, ``cpu`` or a comma-separated list of one kind.

    Raises:
        BuildError: ``text`` is of no such form, or the installed torch is not of that backend.
    """
    archs = tuple(sorted(set(filter(None, re.split(r"[,; ]+", text.strip())))))
    plain = re.sub(r"(\d\.\d)[af]\b", r"\1", text)
    if plain != text:
        # No GPU is looked up by such a name, so nobody would ever find the library.
        raise BuildError(
            f"Architecture {text!r} has a suffix; the kernel uses nothing that needs it.", f"Give {plain}."
        )
    forms: dict[Backend, str] = {"cuda": r"[1-9]\d?\.\d", "rocm": r"gfx[0-9a-f]{3,4}"}
    if archs == ("cpu",):
        return Target("cpu")
    backend = next((b for b, form in forms.items() if archs and all(re.fullmatch(form, a) for a in archs)), None)
    if backend is None:
        raise BuildError(
            f"Unknown architecture {text!r}.",
            "Give a compute capability such as 9.0 (H100) or 10.0 (B200), a gfx name such as gfx942, or cpu.",
        )
    if backend != torch_backend():
        raise BuildError(
            f"Architecture {text!r} needs a torch built for {backend}; the torch installed here is built for "
            f"{torch_backend()}.",
            f"Install vLLM's {backend} build in this environment, or ask for another architecture.",
        )
    return Target(backend, archs)


def detect_target() -> Target:
    """The target for this process: the backend of torch and the architectures of the GPUs it can see.

    ``MLA_FUSION_ARCH`` overrides. A torch with CUDA or ROCm but no visible GPU gives the CPU target.

    Raises:
        BuildError: ``MLA_FUSION_ARCH`` cannot be used.
    """
    override = os.environ.get("MLA_FUSION_ARCH", "").strip()
    if override:
        try:
            return parse_arch(override)
        except BuildError as error:
            raise BuildError(f"MLA_FUSION_ARCH: {error.problem}", f"{error.remedy} Or unset it.") from None
    backend = torch_backend()
    archs = tuple(sorted({gpu.arch for gpu in visible_gpus(backend)}))
    return Target(backend, archs) if archs else Target("cpu")


def lacks_gpu() -> bool:
    """Whether torch is built for GPUs, but neither a visible one nor ``MLA_FUSION_ARCH`` says what to build for."""
    backend = torch_backend()
    return backend != "cpu" and not os.environ.get("MLA_FUSION_ARCH", "").strip() and not visible_gpus(backend)


def chosen_arch() -> str | None:
    """The architecture of the device that this process computes on; None while it has chosen none. Starts no CUDA."""
    import torch

    if torch_backend() == "cpu" or not torch.cuda.is_initialized():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch_backend() == "rocm":
        return str(properties.gcnArchName).split(":")[0]
    return f"{properties.major}.{properties.minor}"


def misfit(built: Target, chosen: str | None = None) -> str | None:
    """Why a library for ``built`` does not run on the GPU that vLLM uses here; None if nothing speaks against it.

    Args:
        built: What the library is for.
        chosen: The architecture of the device of this process (`chosen_arch`). Without one, as where vLLM only prepares
            its workers, a library will do that runs on any visible GPU: each worker then judges by its own device.
    """
    backend = torch_backend()
    if backend == "cpu":
        return None
    found = [chosen] if chosen else sorted({gpu.arch for gpu in visible_gpus(backend)})
    # Without a driver's list there is nothing to compare, but a kernel for the CPU serves no GPU.
    if built.backend == backend and (not found or any(serves(built, arch) for arch in found)):
        return None
    gpus = f"this worker's GPU is {chosen}" if chosen else f"the GPUs here are {', '.join(found) or 'not listed'}"
    return (
        f"it is for {built}, {gpus}. Unset MLA_FUSION_ARCH, or set it to the architectures of all GPUs that are used "
        "(such as 8.0,9.0); `vllm-mla-fusion doctor` lists them."
    )


def serves(built: Target, arch: str) -> bool:
    """Whether a library for ``built`` runs on a GPU of architecture ``arch``."""
    return any(runs_on(each, arch) for each in built.archs)


def runs_on(arch: str, gpu: str) -> bool:
    """NVIDIA's machine code also runs on later minors of its major version; AMD's on its own architecture alone."""
    if arch.startswith("gfx"):
        return arch == gpu
    (major, minor), (gpu_major, gpu_minor) = arch.split("."), gpu.split(".")
    return major == gpu_major and int(minor) <= int(gpu_minor)


def visible_gpus(backend: Backend) -> list[Gpu]:
    """The GPUs this process may use, in the driver's order; empty for the cpu backend."""
    if backend == "cuda":
        return _select(_nvml_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if backend == "rocm":
        gpus = _select(_kfd_gpus(), os.environ.get("ROCR_VISIBLE_DEVICES"))
        # To HIP the last is a second name of the one before it, and vLLM sets both.
        return _select(gpus, os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")))
    return []


def _select(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Applies a ``*_VISIBLE_DEVICES`` list; where it cannot be resolved every GPU stays (a kernel too many is safe)."""
    if visible is None:
        return gpus
    chosen = []
    for token in filter(None, (t.strip() for t in visible.split(","))):
        if token.startswith("MIG-"):
            return gpus
        if re.fullmatch(r"-?\d+", token):
            # Only PCI_BUS_ID numbers as the driver does; the default order is known to CUDA alone.
            mixed = len({gpu.arch for gpu in gpus}) > 1
            if mixed and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
                return gpus
            if not 0 <= int(token) < len(gpus):
                break
            chosen.append(gpus[int(token)])
            continue
        matches = [gpu for gpu in gpus if gpu.uuid.startswith(token)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen


def _nvml_gpus() -> list[Gpu]:
    """All NVIDIA GPUs by NVML, which needs no CUDA context; empty without a driver."""
    with _nvml() as nvml:
        count = ctypes.c_uint()
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        return [gpu for index in range(count.value) if (gpu := _nvml_gpu(nvml, index))]


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """The initialised NVML library; None without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        nvml = None
    if nvml is None or nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _nvml_gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    uuid, name = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    found = (
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
        and nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
        and nvml.nvmlDeviceGetUUID(handle, uuid, 96) == 0
        and nvml.nvmlDeviceGetName(handle, name, 96) == 0
    )
    return Gpu(uuid.value.decode(), f"{major.value}.{minor.value}", name.value.decode()) if found else None


def _kfd_gpus() -> list[Gpu]:
    """All AMD GPUs by the kernel driver's sysfs; its ``90402`` is gfx942 and ``90010`` is gfx90a (hex step)."""
    gpus = []
    for node in sorted(KFD_NODES.glob("*/properties"), key=lambda path: int(path.parent.name)):
        try:
            properties = dict(line.split(maxsplit=1) for line in node.read_text().splitlines())
        except (OSError, ValueError):
            continue
        version = int(properties.get("gfx_target_version", 0))
        if version:
            arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            gpus.append(Gpu(f"GPU-{int(properties.get('unique_id', 0)):x}", arch, arch))
    return gpus


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver runs, such as (13, 0); None without a driver."""
    with _nvml() as nvml:
        version = ctypes.c_int()
        if nvml is None or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) != 0:
            return None
    return version.value // 1000, version.value % 1000 // 10


def driver_version(backend: Backend) -> str | None:
    """The GPU driver's version; None if there is none or it does not say."""
    if backend == "rocm":
        return AMDGPU_VERSION.read_text().strip() if AMDGPU_VERSION.exists() else None
    with _nvml() as nvml:
        version = ctypes.create_string_buffer(80)
        known = nvml is not None and nvml.nvmlSystemGetDriverVersion(version, 80) == 0
    return version.value.decode() if known else None
