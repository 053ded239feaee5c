# SPDX-License-Identifier: Apache-2.0
"""Looks like FlashInfer to vLLM: every module and every name is there; a function returns its first tensor."""

import importlib.abc
import importlib.machinery
import sys
import zlib
from types import ModuleType
from typing import Any, ClassVar

import torch

__version__ = "9.9.9"


class _Module(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (_Instance,), {}) if name[0].isupper() else _function(name)

    def __getitem__(self, index: int) -> bool:
        return True  # AITER's kernels are tuned for every shape


class _Class(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_constant = name[0] == "k" and name[1:2].isupper()
        return zlib.crc32(name.encode()) % 1000 if is_constant else _function(name)


def _function(name: str) -> Any:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not tensors:
            return _Module("result")
        if name == "dynamic_mxfp4_quant":  # two values in a byte, and a scale for each 32
            rows, columns = tensors[0].shape
            return tuple(tensors[0].new_empty(rows, columns // size, dtype=torch.uint8) for size in (2, 32))
        if "block_scale_interleave" in name:  # whose result is flat
            return tensors[0].reshape(-1)
        return torch.arange(len(tensors[0])) if "indices" in name else tensors[0]

    return stand_in


class _Instance(metaclass=_Class):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.startswith(f"{self._package}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(package: str) -> None:
    """Gives the package, which is being imported, every module and every name."""
    sys.meta_path.insert(0, _Finder(package))
    sys.modules[package].__class__ = _Module


stand_in_for(__name__)
