# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel library once per machine and finds it again.

A library lives in ``<cache>/<target>-<sources>-<compilers>/``: ``mla_fusion.so``, ``manifest.json``, ``build.log``.
``<sources>`` covers csrc/, flags, torch, CUDA/HIP and this package; ``<compilers>`` what the compilers say they are.
A warm start runs no compiler: a manifest holds the `toolchain.signature` it was built under, and if that is unchanged
so are the compilers. On a machine without compilers every finished build of the same sources will do.
A build for more architectures than are wanted serves too.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from vllm_mla_fusion import __version__
from vllm_mla_fusion.jit import failures, manifest, toolchain
from vllm_mla_fusion.jit.cache import (
    build_lock,
    builds,
    cache_dir,
    check_executable,
    check_private,
    explain_os_errors,
    make_private,
    sweep,
    work_dir_prefix,
)
from vllm_mla_fusion.jit.compiling import (
    LIBRARY,
    LINK_FLAGS,
    CompileFailed,
    compile_sources,
    csrc_digest,
    csrc_dir,
    cxx_flags,
    device_flags,
)
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.host_compiler import compiler_fault
from vllm_mla_fusion.jit.target import Backend, Target, detect_target
from vllm_mla_fusion.jit.toolchain import Toolchain, check_torch, find_toolchain

__all__ = ["BuildError", "Target", "build", "cache_dir", "csrc_dir", "detect_target", "fingerprint", "library_path"]

logger = logging.getLogger(__name__)


def fingerprint(target: Target) -> str:
    """Address of the library: sources, flags, target, torch, CUDA/HIP and package version, then the compilers.

    Without compilers it is that of the finished build that would be used, or ends in ``none``.
    """
    finished = _find_finished(target)
    if finished:
        return "-".join(finished.parent.name.split("-")[-2:])
    try:
        compilers = _digest(find_toolchain(target.backend).versions(), 8)
    except BuildError:
        compilers = "none"
    return f"{_sources_digest(target)}-{compilers}"


def library_path(target: Target) -> Path:
    """Where the finished library is, or would be."""
    return _find_finished(target) or cache_dir() / f"{target}-{fingerprint(target)}" / LIBRARY


def is_built(target: Target) -> bool:
    """Whether `build` would return at once."""
    return _find_finished(target) is not None


def built_targets() -> list[Target]:
    """What the cache has builds for, finished or damaged, of any sources."""
    return [_target(label) for label in sorted({name["target"] for name in builds(cache_dir()).values()})]


def _target(label: str) -> Target:
    """The target of which ``label`` is the text."""
    backend, *archs = label.split("-")
    return Target(cast(Backend, backend), tuple(archs))


def build(
    target: Target,
    say: Callable[[str], None] = logger.info,
    progress: Callable[[int, int], None] | None = None,
    failure_lasts: float = 0.0,
) -> Path:
    """Returns the library for ``target``; compiles it if this machine has none yet.

    A finished one is returned without ninja, compiler or lock. Of several processes one compiles, the others wait.

    Args:
        target: What to build.
        say: Gets a line when compiling begins and ends and while waiting for another process.
        progress: Gets the number of finished and of all compile steps.
        failure_lasts: Seconds for which a failure with the same sources and compilers is reported, not repeated.

    Raises:
        BuildError: No compiler, a compile error, or a cache directory that cannot be used.
    """
    finished = _find_finished(target)
    if finished:
        return finished
    tools = _tools_or_explain(target)
    root = make_private(cache_dir())
    check_executable(root)
    with explain_os_errors(root), build_lock(root, say) as waited_since:
        finished = _find_finished(target)
        if finished:
            return finished
        compilers = tools.versions()
        final = root / f"{target}-{_sources_digest(target)}-{_digest(compilers, 8)}"
        failures.raise_known(final, waited_since, failure_lasts)
        sweep(root)
        return _build_locked(final, target, tools, compilers, say, progress)


def _build_locked(
    final: Path,
    target: Target,
    tools: Toolchain,
    compilers: dict[str, str],
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> Path:
    root = final.parent
    began = time.monotonic()
    say(f"building the {target} kernel in {root} (once; later starts reuse it)")
    work = Path(tempfile.mkdtemp(prefix=work_dir_prefix(str(target)), dir=root))
    try:
        output = compile_sources(work, target, tools, progress)
        result = work / "result"
        result.mkdir(mode=0o700)
        os.replace(work / LIBRARY, result / LIBRARY)
        _sync(result / LIBRARY)
        _write_synced(result / "build.log", output)
        facts = {
            **manifest.library_facts(result / LIBRARY),
            "target": str(target),
            "sources": _sources_digest(target),
            "compilers": compilers,
            "signature": toolchain.signature(target.backend),
            "seconds": round(time.monotonic() - began, 1),
        }
        _write_synced(result / manifest.MANIFEST, json.dumps(facts, indent=1))
        _put_in_place(result, final, work, say)
    except CompileFailed as failure:
        raise failures.remember(final, failure.output, compiler_fault(tools.cxx)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failures.failure_log(final).unlink(missing_ok=True)
    say(f"built {final / LIBRARY} in {time.monotonic() - began:.1f} s")
    return final / LIBRARY


def _put_in_place(result: Path, final: Path, work: Path, say: Callable[[str], None]) -> None:
    """Renames the finished directory, unless another host, whose lock is not seen here, was faster."""
    if final.exists():
        flaw = _flaw(final)
        if flaw is None:
            return
        say(f"replacing {final}: {flaw}")
        os.replace(final, work / "damaged")
    try:
        os.replace(result, final)
    except OSError:
        if _flaw(final) is not None:
            raise


def _tools_or_explain(target: Target) -> Toolchain:
    """The compilers; without them, the error also names a finished build that cannot be used."""
    check_torch()
    try:
        return find_toolchain(target.backend)
    except BuildError as error:
        flaws = [f"{entry}: {flaw}" for entry in _entries(target) if (flaw := _flaw(entry))]
        unusable = f" A finished build exists but cannot be used: {'; '.join(flaws)}." if flaws else ""
        prebuild = f"vllm-mla-fusion build --arch {','.join(target.archs) or 'cpu'}"
        raise BuildError(
            f"{error.problem}{unusable}",
            f"{error.remedy} Or run `{prebuild}` where all is there, with the same torch, and copy its cache "
            f"directory (~/.cache/vllm-mla-fusion) to {cache_dir()} here.",
        ) from None


# ---- finished builds ------------------------------------------------------------------------------------------------


def _find_finished(target: Target) -> Path | None:
    """The finished library that fits the compilers of this machine; runs none if they are as they were."""
    root = cache_dir()
    with explain_os_errors(root):
        if not root.exists():
            return None
        check_private(root)
        sound = {entry: manifest.read_manifest(entry) for entry in _entries(target) if _flaw(entry) is None}
    if not sound:
        return None
    signature = toolchain.signature(target.backend)
    for entry, found in sound.items():
        if found["signature"] == signature:
            return entry / LIBRARY
    try:
        compilers = find_toolchain(target.backend).versions()
    except BuildError:
        return next(iter(sound)) / LIBRARY
    return next((entry / LIBRARY for entry, found in sound.items() if found["compilers"] == compilers), None)


def _entries(target: Target) -> list[Path]:
    """Directories of these sources with all wanted architectures, those with no others first."""
    found = []
    for entry, name in builds(cache_dir()).items():
        has = _target(name["target"])
        fits = has.backend == target.backend and set(has.archs) >= set(target.archs)
        if fits and name["sources"] == _sources_digest(has):
            found.append((has != target, entry))
    return [entry for _, entry in sorted(found)]


def _flaw(entry: Path) -> str | None:
    """What is wrong with a finished build; None if it can be loaded."""
    return manifest.flaw_of(entry, LIBRARY, target=entry.name.rsplit("-", 2)[0])


# ---- addresses ------------------------------------------------------------------------------------------------------


def _sources_digest(target: Target) -> str:
    import torch

    return _digest(
        {
            "csrc": csrc_digest(),
            "flags": [cxx_flags(target), device_flags(target), LINK_FLAGS],
            "target": str(target),
            "machine": platform.machine(),
            "torch": [torch.__version__, torch.version.cuda, torch.version.hip],
            "package": __version__,
        },
        16,
    )


def _digest(facts: object, length: int) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:length]


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Flushes to disk, so that a full disk or a lost machine shows here and not as a truncated file later."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
