# SPDX-License-Identifier: Apache-2.0
"""Tries nvcc or hipcc on an empty kernel: whether it runs, knows the architectures and accepts its host compiler."""

import re
import tempfile
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.explain import REMEDIES, UNKNOWN_REMEDY
from vllm_mla_fusion.jit.host_compiler import child_variables, complaint, find_host_compiler, write_wrapper
from vllm_mla_fusion.jit.target import Target


def try_empty_kernel(compiler: Path, target: Target, cxx: str) -> None:
    """Compiles a kernel that does nothing, as a build would call the compiler; leaves nothing behind.

    Args:
        compiler: nvcc or hipcc.
        target: For whose architectures.
        cxx: The C++ compiler, which nvcc calls unless the environment names another.

    Raises:
        BuildError: It does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="mla-fusion-trial-") as name:
        folder = Path(name)
        (folder / "empty.cu").write_text("__global__ void nothing() {}\n")
        command = [str(compiler), *_options(folder, target, cxx), "-c", "empty.cu", "-o", "empty.o"]
        said = complaint(command, folder, child_variables())
    if said is not None:
        remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, said)), UNKNOWN_REMEDY)
        raise BuildError(
            f"{compiler} does not compile an empty kernel for {', '.join(target.archs)}: {said[-1000:]}", remedy
        )


def _options(folder: Path, target: Target, cxx: str) -> list[str]:
    if target.backend == "rocm":
        return ["-x", "hip", *(f"--offload-arch={arch}" for arch in target.archs)]
    # Of one word, whatever the command is.
    (folder / "host").mkdir()
    write_wrapper(folder / "host/c++", find_host_compiler(cxx))
    numbers = [arch.replace(".", "") for arch in target.archs]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return ["-std=c++17", "-ccbin", str(folder / "host/c++"), *codes]
