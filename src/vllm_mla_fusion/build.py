# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel library once per machine and finds it again.

A library lives in ``<cache>/<target>-<sources>-<compilers>/``: ``mla_fusion.so``, ``manifest.json``, ``build.log``.
``<sources>`` covers csrc/, flags, torch, CUDA/HIP and this package; ``<compilers>`` what the compilers say they are.
A warm start runs no compiler: a manifest holds the `toolchain.signature` it was built under, and if that is unchanged
so are the compilers. On a machine without compilers every finished build of the same sources will do.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_mla_fusion import __version__, toolchain
from vllm_mla_fusion.build_error import BuildError
from vllm_mla_fusion.cache import (
    build_lock,
    cache_dir,
    check_private,
    explain_os_errors,
    make_private,
    sweep,
    work_dir_prefix,
)
from vllm_mla_fusion.target import Target, detect_target
from vllm_mla_fusion.toolchain import Toolchain, find_toolchain

__all__ = ["BuildError", "Target", "build", "cache_dir", "csrc_dir", "detect_target", "fingerprint", "library_path"]

logger = logging.getLogger(__name__)

NAME = "mla_fusion"
LIBRARY = f"{NAME}.so"
COMPILE_TIMEOUT_SECONDS = 900.0

CXX_FLAGS = ("-O3", "-Wall")
# torch switches bf16 and half conversions off by default; our torch-free .cu is plain CUDA.
CUDA_FLAGS = (
    "-O3",
    "-std=c++17",
    "-lineinfo",
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
BACKEND_DEFINES = {"cpu": (), "cuda": ("-DMLA_FUSION_GPU", "-DUSE_CUDA"), "rocm": ("-DMLA_FUSION_GPU", "-DUSE_ROCM")}
LINK_FLAGS = ("-Wl,--as-needed",)


def csrc_dir() -> Path:
    """The kernel sources: inside the installed package, else those of the checkout (editable install).

    Raises:
        BuildError: Neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parents[1] / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"The kernel sources are missing from {package}.", "pip install --force-reinstall vllm-mla-fusion")


def fingerprint(target: Target) -> str:
    """Address of the library: sources, flags, target, torch, CUDA/HIP and package version, then the compilers.

    Without compilers it is that of the finished build that would be used, or ends in ``none``.
    """
    finished = _find_finished(target)
    if finished:
        return finished.parent.name.removeprefix(f"{target}-")
    try:
        compilers = _digest(_toolchain(target).versions(), 8)
    except BuildError:
        compilers = "none"
    return f"{_sources_digest(target)}-{compilers}"


def library_path(target: Target) -> Path:
    """Where the finished library is, or would be."""
    return cache_dir() / f"{target}-{fingerprint(target)}" / LIBRARY


def is_built(target: Target) -> bool:
    """Whether `build` would return at once."""
    return _find_finished(target) is not None


def build(
    target: Target,
    say: Callable[[str], None] = logger.info,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Returns the library for ``target``; compiles it if this machine has none yet.

    A finished one is returned without ninja, compiler or lock. Of several processes one compiles, the others wait.

    Args:
        target: What to build.
        say: Gets a line when compiling begins and ends and while waiting for another process.
        progress: Gets the number of finished and of all compile steps.

    Raises:
        BuildError: No compiler, a compile error, or a cache directory that cannot be used.
    """
    finished = _find_finished(target)
    if finished:
        return finished
    tools = _toolchain(target)
    root = make_private(cache_dir())
    with explain_os_errors(root), build_lock(root, say) as waited_since:
        finished = _find_finished(target)
        if finished:
            return finished
        _raise_failure_of_other(root, target, waited_since)
        sweep(root)
        return _build_locked(root, target, tools, say, progress)


def _build_locked(
    root: Path,
    target: Target,
    tools: Toolchain,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> Path:
    compilers = tools.versions()
    final = root / f"{target}-{_sources_digest(target)}-{_digest(compilers, 8)}"
    began = time.monotonic()
    say(f"building the {target} kernel in {root} (once; later starts reuse it)")
    work = Path(tempfile.mkdtemp(prefix=work_dir_prefix(str(target)), dir=root))
    try:
        output = _compile(work, target, tools, progress)
        result = work / "result"
        result.mkdir(mode=0o700)
        os.replace(work / LIBRARY, result / LIBRARY)
        _write_synced(result / "build.log", output)
        manifest = {
            **_library_facts(result / LIBRARY),
            "target": str(target),
            "sources": _sources_digest(target),
            "compilers": compilers,
            "signature": toolchain.signature(target.backend),
            "seconds": round(time.monotonic() - began, 1),
        }
        _write_synced(result / "manifest.json", json.dumps(manifest, indent=1))
        if final.exists():
            say(f"replacing {final}: {_flaw(final, target)}")
            os.replace(final, work / "damaged")
        os.replace(result, final)
    except _CompileFailed as failure:
        log = _failure_log(root, target)
        with contextlib.suppress(OSError):
            log.write_text(failure.output)
        raise _compile_error(failure.output, log) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _failure_log(root, target).unlink(missing_ok=True)
    say(f"built {final / LIBRARY} in {time.monotonic() - began:.1f} s")
    return final / LIBRARY


# ---- finished builds ------------------------------------------------------------------------------------------------


def _find_finished(target: Target) -> Path | None:
    """The finished library that fits the compilers of this machine; runs none if they are as they were."""
    root = cache_dir()
    with explain_os_errors(root):
        if not root.exists():
            return None
        check_private(root)
        entries = sorted(root.glob(f"{target}-{_sources_digest(target)}-*"))
        sound = {entry: _manifest(entry) for entry in entries if _flaw(entry, target) is None}
    if not sound:
        return None
    signature = toolchain.signature(target.backend)
    for entry, manifest in sound.items():
        if manifest["signature"] == signature:
            return entry / LIBRARY
    try:
        compilers = _toolchain(target).versions()
    except BuildError:
        return next(reversed(sound)) / LIBRARY
    return next((entry / LIBRARY for entry, found in sound.items() if found["compilers"] == compilers), None)


def _flaw(entry: Path, target: Target) -> str | None:
    """What is wrong with a finished build; None if it can be loaded."""
    try:
        manifest = _manifest(entry)
        facts = _library_facts(entry / LIBRARY)
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    if manifest.get("target") != str(target) or manifest.get("machine") != facts["machine"]:
        return f"is for {manifest.get('target')} on {manifest.get('machine')}"
    changed = [name for name in ("size", "sha256") if manifest.get(name) != facts[name]]
    return f"{LIBRARY} was changed or cut short ({', '.join(changed)})" if changed else None


def _manifest(entry: Path) -> dict[str, Any]:
    manifest = json.loads((entry / "manifest.json").read_text())
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json is not an object")
    return manifest


def _library_facts(library: Path) -> dict[str, object]:
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "machine": platform.machine()}


# ---- addresses ------------------------------------------------------------------------------------------------------


def _sources_digest(target: Target) -> str:
    import torch

    csrc = csrc_dir()
    files = sorted(path for path in csrc.rglob("*") if path.is_file())
    return _digest(
        {
            "csrc": {str(path.relative_to(csrc)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "flags": [_cxx_flags(target), _device_flags(target), LINK_FLAGS],
            "target": str(target),
            "machine": platform.machine(),
            "torch": [torch.__version__, torch.version.cuda, torch.version.hip],
            "package": __version__,
        },
        16,
    )


def _digest(facts: object, length: int) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:length]


def _toolchain(target: Target) -> Toolchain:
    import torch

    return find_toolchain(target.backend, torch.version.cuda)


# ---- compiling ------------------------------------------------------------------------------------------------------


class _CompileFailed(Exception):
    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def _cxx_flags(target: Target) -> list[str]:
    return [*CXX_FLAGS, *BACKEND_DEFINES[target.backend]]


def _device_flags(target: Target) -> list[str]:
    """Flags of the .cu files: machine code for the given architectures only, no PTX that an old driver may refuse."""
    if target.backend == "cuda":
        numbers = [arch.replace(".", "") for arch in target.archs]
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        return [*CUDA_FLAGS, *BACKEND_DEFINES["cuda"], *codes]
    return [*HIP_FLAGS, *BACKEND_DEFINES["rocm"]] if target.backend == "rocm" else []


def _compile(work: Path, target: Target, tools: Toolchain, progress: Callable[[int, int], None] | None) -> str:
    """Compiles a copy of csrc/ in ``work`` to ``work/mla_fusion.so``; returns the compilers' output."""
    sources = _copy_sources(work / "csrc", target)
    job = {
        "name": NAME,
        "sources": [str(path) for path in sources],
        "build_directory": str(work),
        "extra_include_paths": [str(work / "csrc")],
        "extra_cflags": _cxx_flags(target),
        "extra_cuda_cflags": [*_device_flags(target), *_toolkit_flags(tools)],
        "extra_ldflags": [*LINK_FLAGS, *_runtime_link(work, tools)],
        "with_cuda": target.backend != "cpu",
    }
    (work / "job.json").write_text(json.dumps(job))
    (work / "tmp").mkdir()
    output, status = _run_job(work, _child_environment(work, target, tools), progress)
    if status:
        raise _CompileFailed(output)
    return output


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


def _toolkit_flags(tools: Toolchain) -> list[str]:
    if tools.toolkit is None or tools.toolkit.compiler.name != "nvcc":
        return []
    flags = []
    if not os.environ.get("CC") and len(shlex.split(tools.cxx)) == 1:
        flags.append(f"-ccbin={tools.cxx}")
    if tools.toolkit.from_pip:
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
    return [f"-L{folder}"]


def _child_environment(work: Path, target: Target, tools: Toolchain) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
        "CXX": tools.cxx,
        "TMPDIR": str(work / "tmp"),
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
    """Runs compile_job in a process group of its own, which ends when this process does."""
    with _ended(
        subprocess.Popen(
            [sys.executable, "-m", "vllm_mla_fusion.compile_job", str(work / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=work,
            env=environment,
            start_new_session=True,
        )
    ) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and progress:
                progress(int(step[1]), int(step[2]))
        return "".join(lines), child.wait()


@contextlib.contextmanager
def _ended(child: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Kills the child's process group after the time limit and on any exception."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)

    timer = threading.Timer(COMPILE_TIMEOUT_SECONDS, kill)
    timer.start()
    try:
        yield child
    except BaseException:
        kill()
        raise
    finally:
        timer.cancel()
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()
        child.wait()


# ---- failures -------------------------------------------------------------------------------------------------------

ERROR_LINE = re.compile(r"error\b|undefined reference|cannot find|not found|No space left|Killed|fatal", re.IGNORECASE)
COMMAND_LINE = re.compile(r"^\[\d+/\d+\]|^\s*raise |^\s*File \"|^Traceback|CalledProcessError|^ninja: |^FAILED: ")


def _failure_log(root: Path, target: Target) -> Path:
    return root / f"{target}-{_sources_digest(target)}.failed.log"


def _compile_error(output: str, log: Path) -> BuildError:
    problem = f"The kernel does not compile. The compiler says:\n{_error_lines(output)}\n(all of it: {log})"
    if "No space left on device" in output or "File size limit exceeded" in output:
        return BuildError(problem, "Free some disk space, or set MLA_FUSION_CACHE_DIR to another disk.")
    return BuildError(
        problem,
        "Run `vllm-mla-fusion doctor` for the toolchain in use; if it finds no problem, report this with the log.",
    )


def _error_lines(output: str, context: int = 3, limit: int = 40) -> str:
    """The compiler's own error lines with a little of what follows each, without commands and Python's traceback."""
    lines = [line for line in output.splitlines() if line.strip() and not COMMAND_LINE.search(line)]
    near = [any(ERROR_LINE.search(line) for line in lines[max(0, i - context) : i + 1]) for i in range(len(lines))]
    chosen = [line for line, keep in zip(lines, near, strict=True) if keep] or lines[-limit:]
    return "\n".join(f"  {line[:400]}" for line in chosen[:limit])


def _raise_failure_of_other(root: Path, target: Target, waited_since: float | None) -> None:
    """A process that waited for a build that failed reports that failure instead of repeating it."""
    log = _failure_log(root, target)
    if waited_since and log.exists() and log.stat().st_mtime >= waited_since:
        raise _compile_error(log.read_text(), log)


def _write_synced(path: Path, text: str) -> None:
    """Writes and flushes to disk, so that a full disk shows here and not as a truncated file later."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
