# SPDX-License-Identifier: Apache-2.0
"""What a failed build's output means: the compilers' own words, and what to do about the failures that are known."""

import os
import re
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError

# Whatever `compile_job` prints after this line is for the log only.
TRACEBACK = "---- traceback of the build ----"
EXEC_REMEDY = "Set MLA_FUSION_CACHE_DIR to a directory of a file system that is mounted without noexec."
SPACE_REMEDY = "Free some disk space, or set MLA_FUSION_CACHE_DIR to another disk."

ERROR_LINE = re.compile(r"error\b|undefined reference|cannot find|not found|No space left|Killed|fatal", re.IGNORECASE)
# ninja repeats a failed command in a line of its own; what went wrong before any command only ninja itself says.
NOISE = re.compile(r"^\[\d+/\d+\]|^ninja: (?!error|fatal)|^FAILED: |Error building extension|^\s*raise |^Traceback")
FAILED_COMMAND = re.compile(r"^FAILED: ")
LINE_LENGTH = 240

# The first that is found in the output wins.
REMEDIES = (
    (r"No space left on device|File size limit exceeded|Disk quota exceeded|File too large", SPACE_REMEDY),
    (
        r"Unsupported gpu architecture|unknown value.*gpu-architecture",
        "This CUDA toolkit does not know the GPU's architecture: install a newer one and set CUDA_HOME to it, or name "
        "one that it knows in MLA_FUSION_ARCH (9.0 code also runs on later GPUs of major version 9, and so on).",
    ),
    (
        r"unsupported (GNU|clang|Microsoft|IBM|PGI)? ?.*version|unsupported compiler",
        "The host compiler is too new or too old for this CUDA toolkit: install a g++ of the versions that the message "
        "names and set CXX to it (such as CXX=g++-13).",
    ),
    (
        r"exception specification is incompatible",
        "The C library's headers are newer than this CUDA toolkit knows: install a newer toolkit and set CUDA_HOME.",
    ),
    (
        r"unrecognized (command[- ]line )?(option|argument).*std=(gnu|c)\+\+20|invalid value 'c\+\+20'",
        "The C++ compiler is too old for C++20: install g++ 11 or newer and set CXX to it.",
    ),
    (
        r"Killed( signal)?\b|out of memory|Cannot allocate memory|virtual memory exhausted",
        "A compiler ran out of memory or was killed: give the process 2 GiB more, or set MAX_JOBS=1.",
    ),
    (
        r"failed to map segment|cannot apply additional memory protection",
        f"The cache's file system does not let code be loaded from it. {EXEC_REMEDY}",
    ),
    (
        r"(cicc|ptxas|fatbinary|nvlink|cudafe\+\+): (not found|No such file)|sh: .*(cicc|ptxas|fatbinary|nvlink)",
        "The CUDA toolkit lacks a part of its compiler: install it whole and set CUDA_HOME to it.",
    ),
    (
        r"cannot execute .?(as|cc1plus|ld|collect2)\b|(\bas|\bld): not found|"
        r"cannot find .?ld\b|cannot find (crt1|crti|Scrt1)|"
        r"cannot find -l(stdc\+\+|c|m|gcc)\b|fatal error: (cstd\w+|\w+\.h|string|vector|cmath): No such file",
        "The C++ compiler is not whole: install its assembler, linker and headers (Debian, Ubuntu: apt-get install "
        "build-essential).",
    ),
)
CLEAN_REMEDY = "Run `vllm-mla-fusion clean`, then `vllm-mla-fusion build`, on this machine or in the image that serves."
UNKNOWN_REMEDY = (
    "Run `vllm-mla-fusion doctor` for the toolchain in use; if it finds no problem, report this with the log."
)


def compile_error(output: str, log: Path, fault: str | None = None) -> BuildError:
    """The error for people.

    Args:
        output: All that the build printed.
        log: Where it lies.
        fault: What is wrong with the compiler's command, if that was tried.
    """
    problem = f"The kernel does not compile. The compiler says:\n{_error_lines(output)}\n(all of it: {log})"
    if fault and os.environ.get("CXX", "").strip():
        return BuildError(problem, f"Mend the compiler's command, which is set by CXX: {fault}")
    told = output.partition(TRACEBACK)[0]
    known = (remedy for pattern, remedy in REMEDIES if re.search(pattern, told))
    return BuildError(problem, next(known, UNKNOWN_REMEDY))


def load_remedy(said: str) -> str:
    """What to do where a finished library does not load and the loader says this."""
    known = (remedy for pattern, remedy in REMEDIES if re.search(pattern, said))
    return next(known, CLEAN_REMEDY)


def _error_lines(output: str, context: int = 3, limit: int = 40) -> str:
    """The compilers' own error lines with a little of what follows each, without commands and Python's traceback."""
    lines: list[str] = []
    is_command = False
    for line in output.partition(TRACEBACK)[0].splitlines():
        if line.strip() and not is_command and not NOISE.search(line):
            lines.append(line)
        is_command = bool(FAILED_COMMAND.match(line))
    near = [any(ERROR_LINE.search(line) for line in lines[max(0, i - context) : i + 1]) for i in range(len(lines))]
    chosen = [line for line, keep in zip(lines, near, strict=True) if keep] or lines[-limit:]
    return "\n".join(f"  {line[:LINE_LENGTH]}{'...' * (len(line) > LINE_LENGTH)}" for line in chosen[:limit])
