# SPDX-License-Identifier: Apache-2.0
"""Inductor's C++ kernels of a whole graph in one compilation: one for each would take seconds apiece."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import LambdaFuture
from torch.utils.cpp_extension import include_paths, library_paths

# Without contraction, as Inductor's own flags have it.
COMPILER = ["g++", "-std=c++20", "-O0", "-ffp-contract=off", "-fPIC", "-fopenmp", "-w"]
HEADER = "torch/csrc/inductor/cpp_prefix.h"


@functools.cache
def _precompiled() -> tempfile.TemporaryDirectory:
    """The header of all kernels, once in a process: alone it takes longer than a graph's kernels."""
    folder = tempfile.TemporaryDirectory(prefix="mla-fusion-modules-")
    header = Path(folder.name) / "prefix.h"
    header.write_text(f"#include <{HEADER}>\n")
    includes = (f"-I{each}" for each in include_paths())
    subprocess.run([*COMPILER, *includes, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return folder


class _Kernels:
    """The sources that were asked for and, from the first use on, what they compile to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: list[str] = []

    def add(self, source: str) -> Callable[..., None]:
        index = len(self.sources)
        self.sources.append(source.replace("  kernel(", f"  kernel_{index}(").replace(f"#include <{HEADER}>", ""))

        def call(*args: object) -> None:
            pointers = [
                ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else ctypes.c_int64(arg)
                for arg in args
            ]
            getattr(self.library, f"kernel_{index}")(*pointers)

        return call

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        source = "\n".join(['#include "prefix.h"', *self.sources])
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        path = self.folder / f"{name}.cpp"
        path.write_text(source)
        folders = [f"-I{_precompiled().name}", *(f"-I{each}" for each in include_paths())]
        libraries = [*(f"-L{each}" for each in library_paths()), "-lc10", "-ltorch_cpu"]
        subprocess.run([*COMPILER, "-shared", *folders, path, "-o", f"{path}.so", *libraries], check=True)
        return ctypes.CDLL(f"{path}.so")


@contextmanager
def one_compilation(folder: Path) -> Iterator[None]:
    """For one graph that is compiled and first run inside."""
    kernels = _Kernels(folder)

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        call = kernels.add(source_code)
        # With one thread, to which vLLM sets it in a process that starts an engine, nothing waits for futures.
        return LambdaFuture(lambda: call) if get_compile_threads() > 1 else call

    with patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding):
        yield
