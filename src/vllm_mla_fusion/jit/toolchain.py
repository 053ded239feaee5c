# SPDX-License-Identifier: Apache-2.0
"""Finds the compilers: c++, ninja, and a CUDA toolkit or ROCm that fits the installed torch."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.host_compiler import (
    ADDRESSED,
    CXX_REMEDY,
    DROPPED,
    find_cxx,
    find_host_compiler,
    missing_cxx,
    words_of,
)
from vllm_mla_fusion.jit.target import Backend
from vllm_mla_fusion.release import release

DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
DEFAULT_ROCM_HOME = Path("/opt/rocm")
PIP_NVCC = "nvidia-cuda-nvcc"
PIP_PARTS = (PIP_NVCC, "nvidia-nvvm", "nvidia-cuda-crt")

NINJA_REMEDY = "pip install ninja"
OLDEST_TORCH = (2, 11)
TORCH_REMEDY = "Install a vLLM that comes with a newer torch."


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit or ROCm: its root directory, its compiler and where it was found."""

    home: Path
    compiler: Path
    origin: str

    @property
    def from_pip(self) -> bool:
        return self.origin.startswith("pip ")


@dataclass(frozen=True)
class Toolchain:
    """All that one build needs.

    Args:
        cxx: Value for ``CXX``: a command, possibly with arguments (``ccache g++``).
        ninja: The ninja executable.
        toolkit: CUDA toolkit or ROCm; None for the cpu backend.
        host: The command that nvcc calls; None without nvcc.
    """

    cxx: str
    ninja: Path
    toolkit: Toolkit | None
    host: str | None = None

    def versions(self) -> dict[str, str]:
        """What the compilers say of themselves and are told to do: the compiler part of a library's address."""
        commands = {"c++": self.cxx}
        if self.host not in (None, self.cxx):
            commands["nvcc's host"] = self.host
        if self.toolkit:
            commands[self.toolkit.compiler.name] = shlex.quote(str(self.toolkit.compiler))
            if words := words_of("PYTORCH_NVCC"):
                commands["PYTORCH_NVCC"] = shlex.join(words)
        found = {}
        for name, command in commands.items():
            program, *arguments = shlex.split(command)
            found[name] = _version((program, *arguments, "--version"))
            if arguments:
                found[f"{name} arguments"] = shlex.join(arguments)
        return found | {name: os.environ[name] for name in ADDRESSED if os.environ.get(name)}


def check_torch() -> None:
    """Refuses a torch whose headers the kernel does not compile with.

    Raises:
        BuildError: It is too old.
    """
    import torch

    if release(torch.__version__) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(
            f"torch {wanted} or newer is needed (its stable C++ ABI), found {torch.__version__}.", TORCH_REMEDY
        )


def find_toolchain(backend: Backend) -> Toolchain:
    """Finds the tools of a build for ``backend``.

    Raises:
        BuildError: torch is too old, or a tool is missing; says where it was looked for and how to get it.
    """
    check_torch()
    cxx, ninja = find_cxx(), find_ninja()
    if cxx is None:
        raise missing_cxx()
    if ninja is None:
        raise BuildError("ninja was found neither on PATH nor beside this Python.", NINJA_REMEDY)
    toolkit = None if backend == "cpu" else find_toolkit(backend)
    return Toolchain(cxx, ninja, toolkit, find_host_compiler(cxx) if backend == "cuda" else None)


def find_ninja() -> Path | None:
    """ninja on PATH, else the wheel's, which is off PATH when a server starts as /venv/bin/vllm."""
    on_path = shutil.which("ninja")
    if on_path:
        return Path(on_path)
    beside_python = Path(sysconfig.get_path("scripts")) / "ninja"
    if os.access(beside_python, os.X_OK):
        return beside_python
    return next((path for path in _wheel_files("ninja") if path.name == "ninja" and os.access(path, os.X_OK)), None)


def find_toolkit(backend: Backend) -> Toolkit:
    """CUDA toolkit or ROCm for the installed torch.

    Raises:
        BuildError: None is usable.
    """
    import torch

    return find_rocm() if backend == "rocm" else find_cuda(torch.version.cuda or "")


def find_cuda(torch_cuda: str) -> Toolkit:
    """The first usable toolkit of: CUDA_HOME, nvcc on PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc.

    Args:
        torch_cuda: ``torch.version.cuda``; the toolkit's major version must be its own.

    Raises:
        BuildError: None is usable; says why each candidate was not.
    """
    rejected = []
    for origin, home in _cuda_candidates():
        flaw = _cuda_flaw(home, torch_cuda) or (_pip_flaw() if origin.startswith("pip ") else None)
        if flaw is None:
            return Toolkit(home, home / "bin" / "nvcc", origin)
        rejected.append(f"  {origin} ({home}): {flaw}")
    tried = "\n".join(rejected) or "  nothing: CUDA_HOME is not set, no nvcc on PATH, no /usr/local/cuda"
    major = torch_cuda.split(".")[0]
    wheels = " ".join(f"'{part}=={major}.*'" for part in PIP_PARTS)
    # pip has a complete nvcc from CUDA 13 on.
    by_pip = f"pip install -U {wheels} ; or i" if major.isdigit() and int(major) >= 13 else "I"
    raise BuildError(
        f"No CUDA toolkit that fits torch's CUDA {torch_cuda}. Looked at:\n{tried}",
        f"{by_pip}nstall a CUDA {major} toolkit and set CUDA_HOME to it.",
    )


def find_rocm() -> Toolkit:
    """The first ROCm with a hipcc of: ROCM_HOME, ROCM_PATH, pip's SDK, hipcc on PATH, /opt/rocm.

    Raises:
        BuildError: None has one.
    """
    candidates = [(name, Path(os.environ[name])) for name in ("ROCM_HOME", "ROCM_PATH") if os.environ.get(name)]
    sdk = importlib.util.find_spec("_rocm_sdk_core")
    if sdk and sdk.origin:
        candidates.append(("pip rocm-sdk-core", Path(sdk.origin).parent.resolve()))
    hipcc = shutil.which("hipcc")
    if hipcc:
        candidates.append(("hipcc on PATH", Path(hipcc).resolve().parents[1]))
    candidates.append(("default", DEFAULT_ROCM_HOME))
    for origin, home in candidates:
        if os.access(home / "bin" / "hipcc", os.X_OK):
            return Toolkit(home, home / "bin" / "hipcc", origin)
    tried = ", ".join(f"{origin} ({home})" for origin, home in candidates)
    raise BuildError(f"No ROCm with bin/hipcc found. Looked at: {tried}.", "Install ROCm, or set ROCM_HOME to it.")


def signature(backend: Backend) -> dict[str, object]:
    """What decides which compilers are found, read without running one: unchanged means the same compilers."""
    names = ("CXX", "CUDA_HOME", "CUDA_PATH", "ROCM_HOME", "ROCM_PATH", *DROPPED, *ADDRESSED)
    facts: dict[str, object] = {name: os.environ.get(name) for name in names if os.environ.get(name)}
    cxx = find_cxx()
    facts["c++"] = _programs(cxx) if cxx else None
    if backend == "cuda":
        with contextlib.suppress(BuildError):
            facts["nvcc's host"] = _programs(find_host_compiler(cxx)) if cxx else None
        facts["nvcc"] = [_stat(str(home / "bin" / "nvcc")) for _, home in _cuda_candidates(ask=False)]
        facts["nvcc on PATH"] = _stat(shutil.which("nvcc"))
    if backend == "rocm":
        facts["hipcc"] = [_stat(shutil.which("hipcc")), _stat(str(DEFAULT_ROCM_HOME / "bin" / "hipcc"))]
    return facts


def libcudart(home: Path) -> tuple[Path | None, bool]:
    """The toolkit's shared CUDA runtime, and whether ``-lcudart`` finds it (pip's has no unversioned name)."""
    folders = [home / "lib64", home / "lib"]
    plain = next((path for folder in folders if (path := folder / "libcudart.so").exists()), None)
    if plain:
        return plain, True
    return next((path for folder in folders for path in sorted(folder.glob("libcudart.so.*"))), None), False


def _cuda_candidates(ask: bool = True) -> list[tuple[str, Path]]:
    """Every place of a toolkit, best first; ``ask=False`` runs no nvcc."""
    found = [(name, Path(os.environ[name])) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        home = Path(nvcc).resolve().parents[1]
        if ask and not (home / "include" / "cuda_runtime.h").exists():
            home = _home_by_nvcc(nvcc) or home
        found.append(("nvcc on PATH", home))
    if DEFAULT_CUDA_HOME.exists():
        found.append(("default", DEFAULT_CUDA_HOME))
    for path in _wheel_files(PIP_NVCC):
        if path.name == "nvcc" and path.parent.name == "bin":
            found.append((f"pip {PIP_NVCC}", path.parents[1]))
    return found


def _cuda_flaw(home: Path, torch_cuda: str) -> str | None:
    """Why the toolkit cannot be used; None if it can."""
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not (home / part).exists():
            return f"has no {part}"
    if libcudart(home)[0] is None:
        return "has no lib/libcudart.so"
    header = (home / "include" / "cuda_runtime_api.h").read_text(errors="replace")
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)
    major = str(int(version[1]) // 1000) if version else "unknown"
    if major != torch_cuda.split(".")[0]:
        return f"is CUDA {major}, torch is built for CUDA {torch_cuda}"
    return None


def _pip_flaw() -> str | None:
    """pip lets the parts of nvcc have different versions, but its ptxas refuses what a newer nvvm writes."""
    versions = {part: _wheel_version(part) for part in PIP_PARTS}
    if len({version.rsplit(".", 1)[0] for version in versions.values() if version}) > 1:
        return "its parts do not fit together: " + ", ".join(f"{part} {found}" for part, found in versions.items())
    return None


@functools.cache
def _home_by_nvcc(nvcc: str) -> Path | None:
    """The toolkit behind a wrapper script: a dry run prints the directory of the real nvcc."""
    try:
        done = subprocess.run(
            [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    here = re.search(r"_HERE_=(.+)", done.stderr)
    return Path(here[1].strip()).resolve().parent if here else None


def _wheel_files(distribution: str) -> list[Path]:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files]


def _wheel_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)} does not run: {error}", CXX_REMEDY) from None
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}", CXX_REMEDY)
    return done.stdout.strip()


def _programs(command: str) -> list[list[object]]:
    """The programs among the words of a command: a wrapper and what it calls."""
    return [found for word in shlex.split(command) if (found := _stat(shutil.which(word)))]


def _stat(path: str | None) -> list[object] | None:
    """Path, size and whole-second mtime (image layers drop the fraction) of the file behind ``path``."""
    if path is None or not os.path.exists(path):
        return None
    real = os.path.realpath(path)
    stat = os.stat(real)
    return [real, stat.st_size, int(stat.st_mtime)]
