# SPDX-License-Identifier: Apache-2.0
"""Fake weights go through what a release does to real ones after loading: repacking, padding, merging of scales."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import BasevLLMParameter

aten = torch.ops.aten


@contextmanager
def fake_parameters() -> Iterator[None]:
    """vLLM's parameters keep their class, which tells how they are laid out, although their data is fake."""
    stock_make_subclass = torch.Tensor._make_subclass

    def new(cls: type, data: torch.Tensor | None, **_: Any) -> Any:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        parameter.__class__ = _fake_class(cls)
        return parameter

    def make_subclass(cls: type, data: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        """vLLM copies a parameter so; torch does not make a second object of a fake tensor."""
        if not issubclass(cls, BasevLLMParameter):
            return stock_make_subclass(cls, data, *rest, **kwargs)
        copy = data.detach()
        copy.__class__ = cls
        return copy

    with (
        patch.object(BasevLLMParameter, "__new__", new),
        patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass)),
    ):
        yield


@functools.cache
def _fake_class(cls: type) -> type:
    return type(cls.__name__, (FakeTensor, cls), {"__init__": cls.__init__})


class KnownValues(TorchDispatchMode):
    """Answers where code looks at values: scales are 1, all alike, and whatever is asserted of them holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            if getattr(args[0], "constant", None) is not None:
                return args[0].constant.item()
            return {torch.bool: bool}.get(args[0].dtype, int if not args[0].is_floating_point() else float)(1)
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func is aten.isnan.default:
            return torch.tensor(False, device="cpu")  # vLLM asks whether scales were loaded
        if func is aten._unique2.default:
            return tuple(args[0].new_ones(1) for _ in range(3))
        if func is aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **kwargs or {})


def process(model: torch.nn.Module) -> None:
    """What vLLM does after loading, without attention's own, which no graph shows."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "numpy", _zeros))
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(module)
    for parameter in model.parameters():
        if isinstance(parameter, BasevLLMParameter):
            parameter.__class__ = FakeTensor


def _zeros(tensor: torch.Tensor) -> Any:
    return numpy.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))
