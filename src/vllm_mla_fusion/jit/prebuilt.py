# SPDX-License-Identifier: Apache-2.0
"""The library that a platform wheel brings along: how it is made, what it is for, and whether it serves here.

It lies in the package, in ``prebuilt/``: ``mla_fusion.so`` with the kernel for the CPU and for GPUs of several
architectures, and ``manifest.json`` with the digest of the sources that it was made of. A start only reads it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm_mla_fusion.jit.compiling import LIBRARY, compile_sources, csrc_digest
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.manifest import MANIFEST, flaw_of, library_facts, read_manifest
from vllm_mla_fusion.jit.target import Target, driver_cuda, parse_arch, runs_on
from vllm_mla_fusion.jit.toolchain import find_toolchain
from vllm_mla_fusion.release import release

FOLDER = Path(__file__).resolve().parents[1] / "prebuilt"
FORCE_JIT = "MLA_FUSION_JIT"
# A100, A10, L4 and RTX 40, H100, B200 and B300, RTX 50.
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The binding is on torch's stable ABI; with these the library was loaded and called.
TESTED_TORCH = ("2.11", "2.14")


def find(target: Target) -> tuple[Path | None, str]:
    """(Path of the wheel's library, "") if it serves ``target`` here, else (None, why it does not).

    Raises:
        BuildError: ``MLA_FUSION_JIT`` has an unknown value.
    """
    why = _why_not(target)
    return (None, why) if why else (FOLDER / LIBRARY, "")


def _why_not(target: Target) -> str:
    if forces_jit():
        return f"{FORCE_JIT}=1 asks for a build on this machine"
    if not FOLDER.exists():
        return "this installation has none (a pure wheel, an sdist or a checkout)"
    flaw = flaw_of(FOLDER, LIBRARY)
    if flaw is not None:
        return f"{FOLDER / LIBRARY} is damaged: {flaw}"
    manifest = read_manifest(FOLDER)
    if manifest.get("csrc") != csrc_digest():
        return "it was made of other kernel sources than those that are installed"
    try:
        return _torch_misfit(manifest) or _gpu_misfit(manifest, target)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{FOLDER / LIBRARY} is damaged: {MANIFEST} is not as it was made ({error!r})"


def archs() -> tuple[str, ...]:
    """The architectures that the wheel's library is for by its manifest; none without one."""
    found = read_manifest(FOLDER).get("archs") if FOLDER.exists() else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def remedy() -> str:
    """What to do so that the wheel's library serves, where that is in the user's hands; else empty."""
    if not FOLDER.exists():
        return ""
    if forces_jit():
        return f"Unset {FORCE_JIT}: then the wheel's kernel is taken where it fits."
    if flaw_of(FOLDER, LIBRARY) or not archs() or read_manifest(FOLDER).get("csrc") != csrc_digest():
        return "Install the wheel again (pip install --no-deps --force-reinstall and its file)."
    if os.environ.get("MLA_FUSION_ARCH", "").strip():
        return f"Unset MLA_FUSION_ARCH, or set it to what the wheel has and a GPU here needs ({', '.join(archs())})."
    return ""


def forces_jit() -> bool:
    """Whether the environment asks for a build on this machine whatever the wheel has."""
    value = os.environ.get(FORCE_JIT, "").strip()
    if value not in ("", "0", "1"):
        raise BuildError(
            f"{FORCE_JIT} must be 1 (build the kernel on this machine) or 0 or unset (take the wheel's where it fits), "
            f"got {value!r}.",
            "Set one of these, or unset it.",
        )
    return value == "1"


def _torch_misfit(manifest: dict[str, Any]) -> str:
    import torch

    oldest, newest = manifest["torch"]
    if not release(oldest)[:2] <= release(torch.__version__)[:2] <= release(newest)[:2]:
        return f"it was tested with torch {oldest} to {newest}, here is {torch.__version__}"
    cuda = torch.version.cuda
    if cuda is None or cuda.split(".")[0] != manifest["cuda"].split(".")[0]:
        built_for = f"CUDA {cuda}" if cuda else "ROCm" if torch.version.hip else "the CPU"
        return f"it needs a torch for CUDA {manifest['cuda'].split('.')[0]}, this one is for {built_for}"
    return ""


def _gpu_misfit(manifest: dict[str, Any], target: Target) -> str:
    if target.backend not in ("cpu", "cuda"):
        return f"it has no kernel for {target}"
    driver, toolkit = driver_cuda(), release(manifest["cuda"])[:2]
    if driver is not None and driver[0] < toolkit[0]:
        return f"it needs a driver for CUDA {toolkit[0]}, this one is for CUDA {driver[0]}.{driver[1]}"
    for arch in target.archs:
        # The driver compiles PTX, which it must not be older than.
        newer = release(arch) >= release(manifest["ptx"]) and driver is not None and driver >= toolkit
        if not newer and not any(runs_on(each, arch) for each in manifest["archs"]):
            return f"it is for {', '.join(manifest['archs'])}, wanted is {arch}"
    return ""


def wanted_archs(value: str) -> tuple[str, ...]:
    """The architectures that MLA_FUSION_PREBUILT names: ``all``, or a list such as ``9.0,10.0``, in ascending order.

    Raises:
        BuildError: It names something else than NVIDIA's compute capabilities, or torch is not built for CUDA.
    """
    if value.strip().lower() == "all":
        value = ",".join(ARCHS)
    try:
        target = parse_arch(value)
    except BuildError as error:
        raise BuildError(
            f"MLA_FUSION_PREBUILT={value}: {error.problem}",
            "Give compute capabilities such as 9.0,10.0, or all; unset it, or 0, for a wheel without a kernel.",
        ) from None
    if target.backend != "cuda":
        raise BuildError(
            f"MLA_FUSION_PREBUILT={value} is for {target.backend}: a wheel holds code for NVIDIA GPUs only.",
            "Give compute capabilities such as 9.0,10.0, or all; for ROCm the kernel is built where it runs.",
        )
    return tuple(sorted(target.archs, key=release))


def make(folder: Path, archs: tuple[str, ...]) -> None:
    """Compiles the library for ``archs``, and PTX of the newest, into ``folder`` with its manifest.

    Raises:
        BuildError: The tools are missing.
        CompileFailed: The compilers gave up.
    """
    import torch

    target = Target("cuda", archs)
    tools = find_toolchain("cuda")
    with tempfile.TemporaryDirectory(prefix="mla-fusion-wheel-") as work:
        compile_sources(Path(work), target, tools, None, is_portable=True)
        made = Path(work) / "made"
        made.mkdir()
        shutil.move(Path(work) / LIBRARY, made / LIBRARY)
        manifest = {
            **library_facts(made / LIBRARY),
            "csrc": csrc_digest(),
            "archs": list(archs),
            "ptx": archs[-1],
            "cuda": torch.version.cuda,
            "torch": list(TESTED_TORCH),
            "compilers": tools.versions(),
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
