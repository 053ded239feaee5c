# SPDX-License-Identifier: Apache-2.0
"""What ptxas says each kernel takes, read from a finished build's build.log."""

import re
from dataclasses import dataclass

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>[^']+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelResources:
    """One kernel of one architecture: registers per thread; stack frame and spill traffic in bytes per thread."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def kernel_resources(log: str) -> list[KernelResources]:
    """Every kernel that ``log``, the output of ``nvcc -Xptxas=-v``, tells of."""
    return [
        KernelResources(
            found["name"],
            found["arch"],
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in KERNEL.finditer(log)
    ]


def summary(log: str) -> str | None:
    """One line for people, None if the log has no GPU kernel."""
    kernels = kernel_resources(log)
    if not kernels:
        return None
    spilling = [kernel.name for kernel in kernels if kernel.spills or kernel.stack]
    spills = f"{len(spilling)} spill or use local memory: {', '.join(spilling)}" if spilling else "no spills"
    return f"{len(kernels)} kernels, at most {max(kernel.registers for kernel in kernels)} registers, {spills}"
