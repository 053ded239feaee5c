# SPDX-License-Identifier: Apache-2.0
"""A csrc/ that compiles in a moment, and compilers that are made for a test."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from vllm_mla_fusion.jit import cache
from vllm_mla_fusion.jit.build import Target

CPU = Target("cpu")
FORK = multiprocessing.get_context("fork")
SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


def write_sources(folder: Path) -> None:
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text("#define ANSWER 42\n")


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(cache.WORK_DIRS)]


def tool_folder(folder: Path, *names: str) -> Path:
    """A directory for PATH that holds links to these tools only."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return folder


def fake_compiler(folder: Path, version: str) -> Path:
    """g++ that says it is of ``version``."""
    folder.mkdir(exist_ok=True)
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "c++ {version}" && exit\nexec {shutil.which("g++")} "$@"\n'
    )
    script.chmod(0o755)
    return script


def soon(condition: Callable[[], object], seconds: float = 300) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
