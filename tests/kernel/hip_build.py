# SPDX-License-Identifier: Apache-2.0
"""csrc/ for AMD GPUs on a machine without one: hipified, compiled by clang, or compiled to run on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension
from torch.utils.hipify import hipify_python

from vllm_mla_fusion.jit import build, compiling
from vllm_mla_fusion.jit.target import Target

HERE = Path(__file__).parent
EMULATION = HERE / "hip_emulation"
INSTALL = ".ci/install_hip_toolchain.sh"
BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
CLANG_RESOURCES = "/usr/lib/llvm-19/lib/clang/19"

# Number of device library's ISA version files that Debian's HIP 5.2 does not have, and what they say.
NEWER_ISA = {"gfx942": ("942", 9402), "gfx950": ("950", 9500), "gfx1100": ("1100", 11000)}
NEEDS_CLANG_20 = {"gfx950"}


def hipify(into: Path) -> list[Path]:
    """Copies csrc/ and hipifies the copy as torch.utils.cpp_extension.load does on ROCm; returns the .hip files."""
    shutil.copytree(build.csrc_dir(), into)
    hipify_python.hipify(
        project_directory=str(into),
        output_directory=str(into),
        header_include_dirs=[str(into)],
        extra_files=[str(path) for path in sorted(into.glob("*.c*")) if path.suffix != ".cuh"],
        is_pytorch_extension=True,
        show_progress=False,
    )
    return sorted(into.glob("*.hip"))


def device_libraries(into: Path) -> Path:
    """Debian's device libraries with an ISA version file for each newer GPU."""
    into.mkdir()
    for path in BITCODE.glob("*.bc"):
        (into / path.name).symlink_to(path)
    for name, number in NEWER_ISA.values():
        linkage = "linkonce_odr protected local_unnamed_addr addrspace(4)"
        ir = f"@__oclc_ISA_version = {linkage} constant i32 {number}, align 4"
        command = [_tool("clang-19"), "-target", "amdgcn-amd-amdhsa", "-nogpulib", "-Wno-override-module"]
        _run([*command, "-x", "ir", "-", "-emit-llvm", "-c", "-o", into / f"oclc_isa_version_{name}.bc"], ir)
    return into


def hip_command(arch: str, libraries: Path) -> list[str]:
    """A HIP compiler for the architecture."""
    command = [_tool("clang++-19")]
    extra = []
    if arch in NEEDS_CLANG_20:
        zig = importlib.util.find_spec("ziglang")
        triton = importlib.util.find_spec("triton")
        assert zig, f"the Python package ziglang is missing; run {INSTALL}"
        assert triton, "the Python package triton is missing; it comes with vLLM and has the headers of HIP 7"
        command = [str(Path(zig.origin).parent / "zig"), "clang", "-target", "x86_64-linux-gnu"]
        headers = Path(triton.origin).parent / "backends/amd/include"
        # clang 22 has neither the header files of its HIP mode in this wheel nor the macro that HIP's headers use.
        extra = ["-isystem", str(headers), "-resource-dir", CLANG_RESOURCES]
        extra += ["-mcode-object-version=5", "-D__AMDGCN_WAVEFRONT_SIZE=64"]
    return [
        *command,
        "-x",
        "hip",
        *extra,
        "--rocm-path=/usr",
        f"--rocm-device-lib-path={libraries}",
        f"--offload-arch={arch}",
    ]


def assembly(source: Path, arch: str, libraries: Path, flags: Iterable[str] = ()) -> str:
    """Device assembly of a hipified file, with the flags of the product's build and of torch; warnings are errors."""
    out = source.with_suffix(f".{arch}.s")
    product = compiling.device_flags(Target("rocm", (arch,)))
    torchs = [flag for flag in cpp_extension.COMMON_HIPCC_FLAGS if flag != "-fno-gpu-rdc"]
    command = [*hip_command(arch, libraries), *torchs, *product, "-Wall", "-Werror", "-Wno-pass-failed", *flags]
    _run([*command, "--offload-device-only", "-S", source, "-o", out])
    return out.read_text()


@dataclass(frozen=True)
class Kernel:
    """One kernel of a device assembly: its name, its instructions, and what the code object says of its resources."""

    name: str
    instructions: list[str]
    resources: dict[str, str]


def kernels_of(text: str) -> list[Kernel]:
    """All kernels of a device assembly."""
    found = []
    metadata = text[text.index("amdhsa.kernels:") :]
    for entry in re.split(r"\n  - ", metadata)[1:]:
        fields = dict(re.findall(r"^ *\.([a-z_]+): +'?([^'\n]+)'?$", entry, re.MULTILINE))
        if "symbol" not in fields:
            continue
        name = fields["symbol"].removesuffix(".kd")
        body = text[text.index(f"\n{name}:") :]
        body = body[
            : body.index("s_endpgm\n.Lfunc_end") if "s_endpgm\n.Lfunc_end" in body else body.index(".Lfunc_end")
        ]
        instructions = [line.split("//")[0].strip() for line in body.splitlines() if line.startswith("\t")]
        found.append(Kernel(name, instructions, fields))
    return found


PRETENDED_HIP_TORCH = """import sys
import torch
torch.version.hip = "6.4.0"
if "vllm_mla_fusion.jit.compile_job" in sys.orig_argv:
    torch.cuda._is_compiled = lambda: True
"""
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'


def pretended_rocm(home: Path, libraries: Path) -> dict[str, str]:
    """A ROCm in `home`: clang as hipcc, the HIP runtime, and empty libraries of a ROCm torch; returns its environment.

    The torch of a child process with this environment says that it is built for ROCm.
    """
    for folder in ("bin", "lib", "site"):
        (home / folder).mkdir(parents=True)
    hipcc = home / "bin/hipcc"
    flags = f"--rocm-path=/usr --rocm-device-lib-path={libraries}"
    hipcc.write_text(f'#!/bin/sh\nexec {_tool("clang++-19")} {flags} "$@"\n')
    hipcc.chmod(0o755)
    (home / "lib/libamdhip64.so").symlink_to("/usr/lib/x86_64-linux-gnu/libamdhip64.so")
    for name, code in {"c10_hip": "", "torch_hip": STREAM}.items():
        library = home / f"lib/lib{name}.so"
        _run(["g++", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-x", "c++", "-", "-o", library], code)
    (home / "site/sitecustomize.py").write_text(PRETENDED_HIP_TORCH)
    paths = [str(home / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"ROCM_HOME": str(home), "LD_LIBRARY_PATH": str(home / "lib"), "PYTHONPATH": os.pathsep.join(paths)}


def build_emulation(work: Path) -> Emulation:
    """The ops with the hipified launch and device code behind them, for tensors on the CPU."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    # The device's side of numeric.h, not the host's.
    as_device = [f"-I{EMULATION}", "-DMLA_FUSION_GPU", "-DUSE_ROCM"]
    as_device += ["-D__HIPCC__", "-D__HIP_PLATFORM_AMD__", "-D__HIP_DEVICE_COMPILE__"]
    # A misaligned 16-byte access works on the CPU and not on a GPU.
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    units = {source: ["-x", "c++", *as_device, *checks] for source in hipify(work / "csrc")}
    units[EMULATION / "run_cpu.cpp"] = [f"-I{work / 'csrc'}", *as_device]
    units |= {work / "csrc" / name: includes for name in ("launcher.cpp", "binding.cpp")}
    cxx = os.environ.get("CXX", "g++")
    objects = []
    for source, flags in units.items():
        objects.append(work / f"{source.stem}.o")
        namespace = f"-Dmla_fusion={Emulation.NAMESPACE}"
        _run([cxx, "-std=c++20", "-O1", "-g", "-fPIC", namespace, *flags, "-c", source, "-o", objects[-1]])
    library = work / "emulation.so"
    link = [
        "-shared",
        "-fsanitize=undefined",
        f"-L{Path(torch.__file__).parent / 'lib'}",
        "-ltorch_cpu",
        "-ltorch",
        "-lc10",
    ]
    _run([cxx, *objects, *link, "-o", library])
    torch.ops.load_library(library)
    return Emulation(ctypes.CDLL(str(library)))


class Emulation:
    """The emulated ops: as those of `kernel.py`, for tensors on the CPU and one thread (`torch.set_num_threads(1)`)."""

    NAMESPACE = "mla_fusion_emulated"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def configure(self, wave_size: int, last_lane_first: bool) -> None:
        self._library.configure_emulation(wave_size, last_lane_first)

    def op(self, name: str) -> Any:
        return getattr(getattr(torch.ops, self.NAMESPACE), name).default


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing; run {INSTALL}"
    return found


def _run(command: Iterable[object], text: str | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
