# SPDX-License-Identifier: Apache-2.0
"""Recognises the RMSNorm of the query's latent before `q_b`, with the quantisation behind it, and whether one kernel
may do it together with the key and the cached latent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from vllm_mla_fusion.fx import norm as norms
from vllm_mla_fusion.fx import static_quantisation
from vllm_mla_fusion.fx.memory import is_read_by_kernels_only
from vllm_mla_fusion.fx.norm import Norm
from vllm_mla_fusion.fx.ops import VIEWS, FusionOps, Quantiser, arguments, is_functional, mutated_result
from vllm_mla_fusion.fx.reading import NoMatchError, ancestors, fake, numel, shape, symbolic
from vllm_mla_fusion.fx.rope import Site
from vllm_mla_fusion.fx.static_quantisation import FP8_MAX

_GROUP = 128
# As `q_smallest`, for quotients that are exact.
_SMALLEST = 2.0**-80
# Arguments of quantising ops that say nothing which the others, or the strides of the scales, do not say.
_KNOWN = {"is_scale_transposed", "dummy_is_scale_transposed", "dummy_is_tma_aligned"}


@dataclass(frozen=True)
class QueryNorm:
    """The norm of `q_c` in the form that `q_b` gets it: `normed`, and `scales` if it is quantised by scales of its own.

    The rest are arguments of the op that does both norms; `scales_layout` is one of `FusionOps.scale_layouts`.
    """

    norm: Norm
    normed: fx.Node
    scales: fx.Node | None = None
    quant: str = "none"
    rounds_twice: bool = False
    smallest: float = 0.0
    static_scale: fx.Node | None = None
    scales_layout: str = "rows"


def match(update: fx.Node, site: Site, latent: Norm, ops: FusionOps) -> QueryNorm | None:
    """The norm between the qkv_a projection and `q_b`, if the op that does both norms may take it over."""
    if ops.norms is None or site.q_rotated is None:
        return None
    normed, k_rotated, *others = arguments(update).values()
    inputs = {site.positions, site.cos_sin_cache, site.k_pe, latent.kv_c, latent.weight, *others}
    behind = ancestors(site.q_pe) - ancestors(*_nodes(inputs))
    for node in reversed([node for node in update.graph.nodes if node in behind]):
        try:
            found = _norm_of(node, site, ops)
            if found is None:
                continue
            inputs |= {found.norm.kv_c, found.norm.weight, found.static_scale}
            outputs = {update, normed, k_rotated, found.normed, found.scales}
            # What the kernel reads must not be computed from what it makes.
            is_before = outputs.isdisjoint(ancestors(*_nodes(inputs)))
            return found if is_before and _fits(found, site, ops) else None
        except NoMatchError:
            return None
    return None


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    return [each for each in values if isinstance(each, fx.Node)]


def _norm_of(node: fx.Node, site: Site, ops: FusionOps) -> QueryNorm | None:
    """What the node is the result of, if that is a norm, with or without quantisation."""
    quantiser = next((each for each in ops.quantisers if is_functional(node, each.target)), None)
    if quantiser is not None:
        return _quantised(node, quantiser, site, ops)
    static = static_quantisation.written_out(node)
    if static is not None:
        values, scale = static
        norm = _norm(values, site, ops) if len(values.users) == 1 and is_read_by_kernels_only(node) else None
        return QueryNorm(norm, node, quant="static", static_scale=scale) if norm is not None else None
    norm = _norm(node, site, ops)
    return QueryNorm(norm, node) if norm is not None else None


def _norm(node: fx.Node, site: Site, ops: FusionOps) -> Norm | None:
    try:
        found = norms.by_op(node, ops)
        return found if found is not None or node.target in VIEWS else norms.written_out(node, site, ops)
    except NoMatchError:
        return None


def _quantised(node: fx.Node, op: Quantiser, site: Site, ops: FusionOps) -> QueryNorm | None:
    given = node.kwargs
    normed = mutated_result(node, op.result)
    if normed is None or fake(normed).dtype != torch.float8_e4m3fn or not _is_understood(given, op):
        return None
    norm = _norm_with(node, op, site, ops)
    if norm is None:
        return None
    found = QueryNorm(norm, normed, quant=op.quant, rounds_twice=op.rounds_twice, smallest=op.smallest)
    if op.quant == "static":
        scale = given[op.scale]
        return replace(found, static_scale=scale) if isinstance(scale, fx.Node) else None
    if op.quant == "group":
        quant = "group_ue8m0" if given.get("scale_ue8m0") else "group"
        found = replace(found, quant=quant, smallest=float(given.get("eps", op.smallest)))
    scales = mutated_result(node, op.scale)
    written = given[op.scale]
    layout = _layout(written, ops) if isinstance(written, fx.Node) else None
    return replace(found, scales=scales, scales_layout=layout) if layout is not None else None


def _norm_with(node: fx.Node, op: Quantiser, site: Site, ops: FusionOps) -> Norm | None:
    """The norm that a quantising op does itself, or that of which it alone reads the result."""
    source = node.kwargs["input"]
    if not isinstance(source, fx.Node):
        return None
    if not op.has_norm:
        return _norm(source, site, ops) if set(source.users) == {node} else None
    weight, epsilon = node.kwargs["weight"], node.kwargs["epsilon"]
    if not isinstance(weight, fx.Node) or not isinstance(epsilon, float):
        return None
    return Norm(norms.before_clones(source), weight, epsilon)


def _is_understood(given: dict[str, Any], op: Quantiser) -> bool:
    """Whether the op is asked for nothing but what the kernel does."""
    read = {"input", "weight", "epsilon", op.result, op.scale, "scale_ue8m0", "eps", *_KNOWN}
    wanted = {"group_size": _GROUP, "fp8_min": -FP8_MAX, "fp8_max": FP8_MAX}
    rest = {name: value for name, value in given.items() if name not in read}
    return all(value is None or value == wanted.get(name) for name, value in rest.items())


def _layout(scales: fx.Node, ops: FusionOps) -> str | None:
    """How the scales lie in memory, by the name that the op has for it."""
    value = fake(scales)
    if value.dim() != 2 or not isinstance(value.shape[1], int):
        return None
    strides = symbolic(value.stride())
    return next((name for name, of in ops.scale_layouts if symbolic(of(*value.shape)) == strides), None)


def _fits(found: QueryNorm, site: Site, ops: FusionOps) -> bool:
    norm, dtype = found.norm, fake(site.q_pe).dtype
    q_c, weight = fake(norm.kv_c), fake(norm.weight)
    num_tokens, rank = shape(site.positions)[0], shape(norm.kv_c)[-1]
    same_dtype = q_c.dtype == weight.dtype == dtype
    same_shape = shape(norm.kv_c) == shape(found.normed) == (num_tokens, rank) and shape(norm.weight) == (rank,)
    packed = q_c.stride(-1) == 1 and weight.stride(-1) == 1 and symbolic(fake(found.normed).stride()) == (rank, 1)
    if not (same_dtype and same_shape and packed and ops.takes_norms(site.is_neox, dtype, rank)):
        return False
    if found.quant == "none":
        return is_read_by_kernels_only(found.normed)
    if found.static_scale is not None:
        scale = fake(found.static_scale)
        return numel(found.static_scale) == 1 and (scale.dtype, scale.device) == (torch.float32, q_c.device)
    return found.smallest >= _SMALLEST and (found.quant == "token" or rank % _GROUP == 0)
