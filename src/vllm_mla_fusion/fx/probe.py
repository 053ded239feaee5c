# SPDX-License-Identifier: Apache-2.0
"""Evaluates a part of a graph on small random numbers, to see what it computes whatever it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from vllm_mla_fusion.fx.ops import PRECISION_CHANGES, FusionOps, rotary_op
from vllm_mla_fusion.fx.reading import PROBE_TOKENS, NoMatchError, is_evaluable, probe_size, shape

_POSITIONS = 7
_MAX_ELEMENTS = 1 << 24
# From here on a fixed number of tokens is evaluated as a small one, unless another dimension has the same size.
_MANY_TOKENS = 512
# Rounding to one of these is no step of its own; to fp8 or an integer it is.
_EVALUABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CANNOT_EVALUATE = (RuntimeError, TypeError, ValueError, IndexError)


class Probe:
    """Evaluates nodes on small random float64 tensors on the CPU, the number of tokens replaced by a small one."""

    def __init__(self, positions: fx.Node, cos_sin_cache: fx.Node, ops: FusionOps) -> None:
        self._ops = ops
        self._random = torch.Generator().manual_seed(0)
        self._many_tokens = _many_tokens(positions)
        num_tokens = self._size(shape(positions)[0])
        rot_dim = shape(cos_sin_cache)[-1]
        self._rows = torch.randint(_POSITIONS, (num_tokens,), generator=self._random)
        self._table = torch.randn(_POSITIONS, rot_dim, generator=self._random, dtype=torch.float64)
        self._values: dict[fx.Node, Any] = {positions: self._rows, cos_sin_cache: self._table}

    def is_rotation(self, rotated: fx.Node, source: fx.Node, is_neox: bool) -> bool:
        """Whether `rotated` is `source` rotated by the angles of the positions, in this pairing."""
        if shape(source)[-1] != self._table.shape[-1]:
            return False
        with _disable_current_modes():
            try:
                expected = self._rotate(self._value(source), is_neox)
                actual = self._value(rotated)
            except _CANNOT_EVALUATE:
                return False
            return actual.numel() == expected.numel() and torch.allclose(actual, expected.view_as(actual), rtol=1e-9)

    def is_rms_norm(self, normed: fx.Node, source: fx.Node, weight: fx.Node, epsilon: float) -> bool:
        """Whether `normed` is the RMSNorm of `source`, over its last dimension, times `weight`."""
        with _disable_current_modes():
            try:
                x = self._value(source)
                expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * self._value(weight)
                actual = self._value(normed)
            except _CANNOT_EVALUATE:
                return False
            return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9)

    def _rotate(self, x: torch.Tensor, is_neox: bool) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = self._table[self._rows].view(x.shape[0], *(1,) * (x.dim() - 2), 2 * half)
        cos, sin = angles[..., :half], angles[..., half:]
        a, b = (x[..., :half], x[..., half:]) if is_neox else (x[..., 0::2], x[..., 1::2])
        rotated = (a * cos - b * sin, b * cos + a * sin)
        return torch.cat(rotated, -1) if is_neox else torch.stack(rotated, -1).flatten(-2)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._evaluate(node) if is_evaluable(node, self._ops) else self._leaf(node)
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in _EVALUABLE_DTYPES:
            raise TypeError(f"{node} has dtype {value.dtype}, which rounds too much to be passed over")
        rotary = rotary_op(node, self._ops)
        if rotary is not None:
            is_neox = bool(node.kwargs[rotary.is_neox])
            return None, *(self._rotate(self._value(node.kwargs[name]), is_neox) for name in ("query", "key"))
        args = fx.map_arg(node.args, self._value)
        if node.target in PRECISION_CHANGES:
            return args[0]
        kwargs = {name: self._value(arg) if isinstance(arg, fx.Node) else arg for name, arg in node.kwargs.items()}
        args = torch.utils._pytree.tree_map_only((int, torch.SymInt), self._size, args)
        return node.target(*args, **kwargs)

    def _leaf(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._size(value)
        sizes = [self._size(size) for size in shape(node)]
        if torch.Size(sizes).numel() > _MAX_ELEMENTS:
            raise NoMatchError(
                f"{node} of shape {sizes} is too large to evaluate, in a graph that was compiled for a fixed number "
                "of tokens which is also the size of another dimension; take that number out of compile_sizes"
            )
        return torch.randn(sizes, generator=self._random, dtype=torch.float64)

    def _size(self, size: int | torch.SymInt) -> int | bool:
        if isinstance(size, bool):
            return size
        found = probe_size(size)
        return PROBE_TOKENS if found == self._many_tokens else found


def _many_tokens(positions: fx.Node) -> int | None:
    """The fixed number of tokens of a graph in which it is large and no other dimension's size."""
    num_tokens = shape(positions)[0]
    if num_tokens < _MANY_TOKENS:
        return None
    others = {size for node in positions.graph.nodes for size in shape(node)[1:]}
    return None if num_tokens in others else num_tokens
