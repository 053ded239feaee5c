# SPDX-License-Identifier: Apache-2.0
"""The C++ compilers as the environment names them: the one of the .cpp files, and the one that nvcc calls."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError

CXX_REMEDY = "Install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set CXX to one."
CXX_NAMES = ("c++", "g++", "clang++")
NVCC_FLAGS = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")
CCBIN_FLAGS = ("-ccbin", "--compiler-bindir")
UNSUPPORTED_FLAGS = ("-allow-unsupported-compiler", "--allow-unsupported-compiler")
# What these say would change the machine code behind our back: flags that compilers add to those of a command, and the
# variables of nvcc.profile. Of nvcc's only the choice of the host compiler is kept.
DROPPED = (
    *NVCC_FLAGS,
    *("NVCC_CCBIN", "CC", "PTXAS_FLAGS", "CUDAFE_FLAGS", "NVVM_FLAGS", "INCLUDES", "SYSTEM_INCLUDES", "LIBRARIES"),
    *("HIPCC_COMPILE_FLAGS_APPEND", "HIPCC_LINK_FLAGS_APPEND"),
    *("CCC_OVERRIDE_OPTIONS", "CCC_ADD_ARGS", "QA_OVERRIDE_GCC3_OPTIONS"),
)
# Installations need these to find their own files; what is built under others has another address.
ADDRESSED = (
    *("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LD_RUN_PATH"),
    *("NIX_CFLAGS_COMPILE", "NIX_LDFLAGS", "HIP_CLANG_PATH", "HIP_DEVICE_LIB_PATH", "DEVICE_LIB_PATH", "PYTORCH_NVCC"),
)
TRIAL_SECONDS = 60.0


def words_of(variable: str) -> list[str]:
    """The words of a variable; none if it is unset or blank."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(
            f"{variable}={os.environ[variable]!r} is no command: {error}.", f"Correct {variable}, or unset it."
        ) from None


def find_cxx() -> str | None:
    """The C++ compiler's command: ``CXX``, else c++, g++, clang++ on PATH; `missing_cxx` says why none is found."""
    try:
        chosen = words_of("CXX")
    except BuildError:
        return None
    if chosen:
        return shlex.join(chosen) if shutil.which(chosen[0]) else None
    return next((path for name in CXX_NAMES if (path := shutil.which(name))), None)


def missing_cxx() -> BuildError:
    """Why `find_cxx` finds none."""
    try:
        chosen = words_of("CXX")
    except BuildError as error:
        return error
    if not chosen:
        return BuildError(f"No C++ compiler found ({', '.join(CXX_NAMES)} on PATH).", CXX_REMEDY)
    value = os.environ["CXX"]
    return BuildError(f"No C++ compiler found: CXX={value!r} names {chosen[0]}, which is not there.", CXX_REMEDY)


def find_host_compiler(cxx: str) -> str:
    """The command that nvcc is to call: ``CC``, else what nvcc's own variables name, else ``cxx``.

    Raises:
        BuildError: The one that is named is not there.
    """
    for origin, command in _host_choices():
        if shutil.which(command[0]):
            return shlex.join(command)
        raise BuildError(
            f"nvcc's host compiler is not there: {origin}={os.environ[origin]!r} names {command[0]}.",
            f"Set {origin} to a compiler, or unset it: nvcc then calls {cxx}.",
        )
    return cxx


def _host_choices() -> list[tuple[str, list[str]]]:
    """The variable and the command of every choice of nvcc's host compiler, the first to be followed."""
    found = []
    cc = words_of("CC")
    if cc:
        found.append(("CC", cc))
    for name in NVCC_FLAGS:
        words = words_of(name)
        for index, word in enumerate(words):
            flag, has_value, value = word.partition("=")
            if flag in CCBIN_FLAGS and (has_value or index + 1 < len(words)):
                found.append((name, [value if has_value else words[index + 1]]))
    if os.environ.get("NVCC_CCBIN", "").strip():
        found.append(("NVCC_CCBIN", [os.environ["NVCC_CCBIN"]]))
    # nvcc accepts the directory of a g++ too.
    return [(origin, [f"{c[0]}/g++"] if os.path.isdir(c[0]) else c) for origin, c in found]


def child_variables() -> dict[str, str]:
    """This environment without what may change the machine code unseen."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    # torch puts ccache or sccache before the compilers when one is on PATH, whether it works here or not.
    kept["TORCH_NO_COMPILER_WRAPPER"] = "1"
    if any(flag in words_of(name) for name in NVCC_FLAGS for flag in UNSUPPORTED_FLAGS):
        kept["NVCC_APPEND_FLAGS"] = UNSUPPORTED_FLAGS[0]
    return kept


def write_wrapper(path: Path, command: str) -> None:
    """A program of one word for a command that may have several: torch and nvcc take ``CXX`` and ``CC`` for one."""
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o700)


def compiler_fault(command: str) -> str | None:
    """Why ``command`` compiles not even an empty file here; None if it does. Names a wrapper that alone is to blame."""
    said = _trial(shlex.split(command))
    if said is None:
        return None
    wrapper, *rest = shlex.split(command)
    if rest and not rest[0].startswith("-") and _trial(rest) is None:
        return f"`{wrapper}` in front of the compiler fails, `{shlex.join(rest)}` alone works: {said}"
    return f"`{command}` does not compile an empty file: {said}"


def _trial(command: list[str]) -> str | None:
    """The last that the compiler says if it fails; None if it compiles."""
    with tempfile.TemporaryDirectory(prefix="mla-fusion-trial-") as folder:
        (Path(folder) / "empty.cpp").touch()
        said = complaint([*command, "-c", "empty.cpp", "-o", "empty.o"], folder)
    return said and said.splitlines()[-1][:300]


def complaint(command: list[str], folder: str | Path, environment: dict[str, str] | None = None) -> str | None:
    """All that a compiler says if it fails in ``folder``; None if it compiles."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRIAL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
