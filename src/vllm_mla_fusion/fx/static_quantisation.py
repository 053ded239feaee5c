# SPDX-License-Identifier: Apache-2.0
"""Recognises the quantisation to float8_e4m3fn by a given scale where it is written out in aten ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vllm_mla_fusion.fx.memory import viewed
from vllm_mla_fusion.fx.ops import ACTIVATION_DTYPES, aten
from vllm_mla_fusion.fx.precision import converts
from vllm_mla_fusion.fx.reading import fake, numel

FP8_MAX = 448.0
# Which of an op's arguments is the lower and which the upper bound.
_BOUNDS: dict[Any, dict[int, float]] = {
    aten.clamp.default: {1: -FP8_MAX, 2: FP8_MAX},
    aten.clamp_min.default: {1: -FP8_MAX},
    aten.clamp_max.default: {1: FP8_MAX},
}


def written_out(quantised: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(values, scale) if the node is the values times the scale's reciprocal in float32, saturated and rounded once, as
    our kernel and vLLM's op have it, and nothing else reads what lies between. A quotient would be another."""
    if not converts(quantised, torch.float8_e4m3fn):
        return None
    product = _unclamped(quantised.args[0])
    if product is None or product.target is not aten.mul.Tensor or len(product.users) > 1:
        return None
    if fake(product).dtype != torch.float32:
        return None
    for wide, factor in (product.args, product.args[::-1]):
        scale = _inverted(factor)
        if scale is not None and isinstance(wide, fx.Node) and converts(wide, torch.float32) and len(wide.users) == 1:
            values = wide.args[0]
            if isinstance(values, fx.Node) and fake(values).dtype in ACTIVATION_DTYPES:
                return values, scale
    return None


def _unclamped(node: Any) -> fx.Node | None:
    """What was clamped to float8_e4m3fn's range; None if it was not, or to another."""
    bounds: list[float] = []
    while isinstance(node, fx.Node) and node.target in _BOUNDS:
        given = {index: node.args[index] for index in _BOUNDS[node.target] if len(node.args) > index}
        if node.kwargs or given != _BOUNDS[node.target] or len(node.users) > 1:
            return None
        bounds += _BOUNDS[node.target].values()
        node = node.args[0]
    return node if isinstance(node, fx.Node) and sorted(set(bounds)) == [-FP8_MAX, FP8_MAX] else None


def _inverted(factor: Any) -> fx.Node | None:
    """The one float32 value of which the factor is the reciprocal."""
    while isinstance(factor, fx.Node) and factor.target is not aten.reciprocal.default:
        factor = viewed(factor)
    scale = factor.args[0] if isinstance(factor, fx.Node) else None
    if not isinstance(scale, fx.Node) or numel(scale) != 1 or fake(scale).dtype != torch.float32:
        return None
    return scale
