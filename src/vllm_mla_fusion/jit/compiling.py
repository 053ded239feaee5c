# SPDX-License-Identifier: Apache-2.0
"""Compiles a copy of csrc/ in a child process."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_mla_fusion import installation
from vllm_mla_fusion.jit import toolchain
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.host_compiler import child_variables, write_wrapper
from vllm_mla_fusion.jit.target import Target
from vllm_mla_fusion.jit.toolchain import Toolchain

NAME = "mla_fusion"
LIBRARY = f"{NAME}.so"
COMPILE_TIMEOUT_SECONDS = 900.0
GRACE_SECONDS = 10.0

# Contraction would round the CPU kernel's rotation differently from one machine to the next.
CXX_FLAGS = ("-Wall", "-ffp-contract=off")
# torch switches bf16 and half conversions off by default; our torch-free .cu is plain CUDA. nvcc optimises device code
# fully whatever the level, which is the launcher's.
CUDA_FLAGS = (
    "-O1",
    "-std=c++17",
    "-Xptxas=-v",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
)
HIP_FLAGS = (
    "-O3",
    "-std=c++17",
    "-Rpass-analysis=kernel-resource-usage",
    "-U__HIP_NO_HALF_OPERATORS__",
    "-U__HIP_NO_HALF_CONVERSIONS__",
)
# USE_CUDA on ROCm too: torch declares its C function for the current stream, one name for both, under that macro only.
BACKEND_DEFINES = {
    "cpu": (),
    "cuda": ("-DMLA_FUSION_GPU", "-DUSE_CUDA"),
    "rocm": ("-DMLA_FUSION_GPU", "-DUSE_ROCM", "-DUSE_CUDA"),
}
LINK_FLAGS = ("-Wl,--as-needed",)
# torch's headers then offer what `toolchain.OLDEST_TORCH` has, whichever torch they are of.
PORTABLE_FLAGS = (
    "-DMLA_FUSION_PORTABLE",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*toolchain.OLDEST_TORCH),
)
# torch knows its compilers by their names.
CXX_WRAPPER = Path("c++")
HOST_WRAPPER = Path("host/c++")


# A path of other characters means something to ninja, a shell or nvcc, in which torch puts it unquoted.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+@-]*")
OWN_DIRECTORY = Path("/proc/self/cwd")


def csrc_dir() -> Path:
    """The kernel sources: inside the installed package, else those of the checkout (editable install).

    Raises:
        BuildError: Neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parents[1] / "csrc"):
        if any(folder.glob("*.cpp")):
            return folder
    raise BuildError(f"The kernel sources are missing from {package}.", installation.install_again())


def csrc_digest() -> str:
    """Of the names and contents of the kernel sources."""
    csrc = csrc_dir()
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(f"{path.relative_to(csrc)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


class CompileFailed(Exception):
    """The compilers gave up; `output` is all that they said."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def cxx_flags(target: Target, is_portable: bool = False) -> list[str]:
    """Flags of the .cpp files."""
    # A GPU's first start waits for this, and a wheel is downloaded; its .cpp files check and launch.
    level = "-O3" if target.backend == "cpu" else "-Os" if is_portable else "-O1"
    return [level, *CXX_FLAGS, *BACKEND_DEFINES[target.backend], *(PORTABLE_FLAGS if is_portable else ())]


def device_flags(target: Target, is_portable: bool = False) -> list[str]:
    """Flags of the .cu files: machine code for the given architectures only, no PTX that an old driver may refuse.

    A portable library has PTX of its last architecture for GPUs that are newer than it; nobody takes that unseen.
    """
    if target.backend == "cuda":
        numbers = [arch.replace(".", "") for arch in target.archs]
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        if is_portable:
            codes += [f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}", "--compress-mode=size"]
            codes += ["--threads=0"]
        return [*CUDA_FLAGS, *BACKEND_DEFINES["cuda"], *codes]
    return [*HIP_FLAGS, *BACKEND_DEFINES["rocm"]] if target.backend == "rocm" else []


def compile_sources(
    work: Path,
    target: Target,
    tools: Toolchain,
    progress: Callable[[int, int], None] | None,
    is_portable: bool = False,
) -> str:
    """Compiles a copy of csrc/ in ``work`` to ``work/mla_fusion.so``; returns the compilers' output.

    Args:
        work: A directory of its own.
        target: What to compile for.
        tools: With what.
        progress: Gets the number of finished and of all compile steps.
        is_portable: The library goes to other machines, with any torch from the oldest on.
    """
    place = _name_in_commands(work)
    sources = _copy_sources(work / "csrc", target)
    if is_portable:
        sources = _device_code_as_one(sources)
    job = {
        "name": NAME,
        "sources": [str(place / path.relative_to(work)) for path in sources],
        "build_directory": str(place),
        "extra_include_paths": [str(place / "csrc")],
        "extra_cflags": cxx_flags(target, is_portable),
        "extra_cuda_cflags": [*device_flags(target, is_portable), *_toolkit_flags(place, tools)],
        "extra_ldflags": [*LINK_FLAGS, *(("-s",) if is_portable else ()), *_runtime_link(work, tools)],
        "with_cuda": target.backend != "cpu",
    }
    (work / "job.json").write_text(json.dumps(job))
    (work / "tmp").mkdir()
    _write_wrappers(work, tools)
    output, status = _run_job(work, _child_environment(work, target, tools), progress)
    if status:
        raise CompileFailed(output)
    return output


def _name_in_commands(work: Path) -> Path:
    """``work``, or another name for it that needs no quotes in its own processes, all of which run in it."""
    return work if PLAIN_PATH.fullmatch(str(work)) else OWN_DIRECTORY


def _write_wrappers(work: Path, tools: Toolchain) -> None:
    write_wrapper(work / CXX_WRAPPER, tools.cxx)
    if tools.host:
        (work / HOST_WRAPPER).parent.mkdir()
        write_wrapper(work / HOST_WRAPPER, tools.host)


def _copy_sources(into: Path, target: Target) -> list[Path]:
    """Copies csrc/ without its modes (a read-only package stays readable only) and lists what is to be compiled."""
    csrc = csrc_dir()
    for path in sorted(csrc.rglob("*")):
        if path.is_file():
            copy = into / path.relative_to(csrc)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    suffixes = {".cpp"} if target.backend == "cpu" else {".cpp", ".cu"}
    return sorted(path for path in into.rglob("*") if path.suffix in suffixes)


def _device_code_as_one(sources: list[Path]) -> list[Path]:
    """One unit in place of the .cu files: its kernels are much alike, and are compressed together."""
    others = [path for path in sources if path.suffix != ".cu"]
    device = [path for path in sources if path.suffix == ".cu"]
    if not device:
        return others
    joined = device[0].with_name("device_code.cu")
    joined.write_text("".join(f'#include "{path.name}"\n' for path in device))
    return [*others, joined]


def _toolkit_flags(place: Path, tools: Toolchain) -> list[str]:
    flags = [f"-ccbin={place / HOST_WRAPPER}"] if tools.host else []
    if tools.toolkit and tools.toolkit.from_pip:
        # pip resolves nvcc and the CUDA headers to different minor versions, which CCCL refuses by default.
        flags.append("-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK")
    return flags


def _runtime_link(work: Path, tools: Toolchain) -> list[str]:
    """pip's toolkit has libcudart.so.13 but no libcudart.so for ``-lcudart``: a link in the build directory."""
    if tools.toolkit is None or tools.toolkit.compiler.name != "nvcc":
        return []
    library, plain = toolchain.libcudart(tools.toolkit.home)
    if plain or library is None:
        return []
    folder = work / "link"
    folder.mkdir()
    (folder / "libcudart.so").symlink_to(library)
    return [f"-L{_name_in_commands(work) / 'link'}"]


def _child_environment(work: Path, target: Target, tools: Toolchain) -> dict[str, str]:
    place = _name_in_commands(work)
    environment = {
        **child_variables(),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
        "CXX": str(place / CXX_WRAPPER),
        "TMPDIR": str(place / "tmp"),
        "LC_ALL": "C",
        "PYTORCH_ROCM_ARCH": ";".join(target.archs) if target.backend == "rocm" else "",
        # The child needs no GPU, and must not take a context on one.
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }
    if shutil.which("ninja") is None:
        environment["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{tools.ninja.parent}"
    if tools.toolkit:
        environment["ROCM_HOME" if target.backend == "rocm" else "CUDA_HOME"] = str(tools.toolkit.home)
    return environment


def _run_job(work: Path, environment: dict[str, str], progress: Callable[[int, int], None] | None) -> tuple[str, int]:
    """Runs compile_job in a session of its own, which ends with it, with this process or after the time limit."""
    lines: list[str] = []
    child = subprocess.Popen(
        [sys.executable, "-m", "vllm_mla_fusion.jit.compile_job", "job.json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=work,
        env=environment,
        start_new_session=True,
    )

    def supervise() -> None:
        try:
            child.wait(COMPILE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            lines.append(f"error: gave up after {COMPILE_TIMEOUT_SECONDS:.0f} s\n")
        # Also after its own end: compilers that outlive ninja would keep the output open, and the lock held.
        _end_session(child)

    supervisor = threading.Thread(target=supervise, daemon=True)
    supervisor.start()
    with child:
        try:
            for line in child.stdout or ():
                lines.append(line)
                step = re.match(r"\[(\d+)/(\d+)\]", line)
                if step and progress:
                    progress(int(step[1]), int(step[2]))
            return "".join(lines), child.wait()
        finally:
            if child.poll() is None:
                _end_session(child)
            supervisor.join()


def _end_session(leader: subprocess.Popen[str]) -> None:
    """Ends what is left of the processes that ``leader`` started; compilers are in process groups of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _session_members(leader.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while leader.poll() is None or _session_members(leader.pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _session_members(session: int) -> list[int]:
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) == session:
                members.append(int(process.name))
    return members
