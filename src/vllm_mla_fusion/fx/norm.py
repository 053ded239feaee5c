# SPDX-License-Identifier: Apache-2.0
"""Recognises the RMSNorm of the latent, as vLLM's op, as its kernel's op or written out, and whether it may join."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from vllm_mla_fusion.fx.memory import may_overlap, storage
from vllm_mla_fusion.fx.ops import VIEWS, FusionOps, arguments, aten, is_functional
from vllm_mla_fusion.fx.probe import Probe
from vllm_mla_fusion.fx.reading import NoMatchError, ancestors, attention_of, cone, fake, shape
from vllm_mla_fusion.fx.rope import Site


@dataclass(frozen=True)
class Norm:
    """normed = RMSNorm(kv_c) * weight; of the query's latent too."""

    kv_c: fx.Node
    weight: fx.Node
    epsilon: float


def match(update: fx.Node, normed: fx.Node, site: Site, ops: FusionOps) -> Norm | None:
    """The norm that makes the cached latent, if the fused op may take it over."""
    if ops.fused_norm is None:
        return None
    attention = attention_of(update)
    if any(user not in (update, attention) and user.op != "output" for user in normed.users):
        return None
    try:
        norm = by_op(normed, ops) or written_out(normed, site, ops)
        if norm is None or not _fits(norm, normed, site):
            return None
    except NoMatchError:
        return None
    if normed in ancestors(site.positions, site.cos_sin_cache, site.q_pe, site.k_pe):
        return None
    return norm


def by_op(normed: fx.Node, ops: FusionOps) -> Norm | None:
    """The norm as an op, or its kernel's, of which `normed` is the result."""
    if ops.rms_norm is not None and normed.target is ops.rms_norm:
        x, weight, epsilon, *rest = arguments(normed).values()
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and not any(rest):
            return Norm(x, weight, float(epsilon))
    source = normed.args[0] if normed.target is operator.getitem else None
    if isinstance(source, fx.Node) and is_functional(source, ops.rms_norm_out) and ops.rms_norm_out is not None:
        x, weight, epsilon = (source.kwargs[name] for name in ("input", "weight", "epsilon"))
        if normed.args[1] == 1 and isinstance(x, fx.Node) and isinstance(weight, fx.Node):
            return Norm(before_clones(x), weight, float(epsilon))
    return None


def before_clones(x: fx.Node) -> fx.Node:
    """vLLM makes the input of its ops contiguous, which our kernel does not need."""
    while x.target is aten.clone.default and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def written_out(normed: fx.Node, site: Site, ops: FusionOps) -> Norm | None:
    """The norm in aten ops, again by evaluating it."""
    its_cone = cone(normed, ops)
    rank = shape(normed)[-1:]
    weights = [node for node in its_cone if shape(node) == rank]
    epsilons = {arg for node in its_cone for arg in node.args[1:2] if isinstance(arg, float) and 0 < arg < 1}
    if not any(node.target is aten.rsqrt.default for node in its_cone):
        return None
    probe = Probe(site.positions, site.cos_sin_cache, ops)
    for x in its_cone:
        if x is normed or shape(x) != shape(normed) or x.target not in VIEWS:
            continue
        for weight in weights:
            for epsilon in epsilons:
                if probe.is_rms_norm(normed, x, weight, epsilon):
                    return Norm(x, weight, epsilon)
    return None


def _fits(norm: Norm, normed: fx.Node, site: Site) -> bool:
    dtype = fake(site.q_pe).dtype
    x, weight = fake(norm.kv_c), fake(norm.weight)
    same_dtype = x.dtype == weight.dtype == fake(normed).dtype == dtype
    same_shape = shape(norm.kv_c) == shape(normed) and shape(norm.weight) == shape(normed)[-1:]
    packed = x.dim() == 2 and x.stride(-1) == 1 and weight.stride(-1) == 1
    return same_dtype and same_shape and packed and not may_overlap(norm.kv_c, site.q_pe)


def costs_another(norm: Norm, normed: fx.Node, ops: FusionOps) -> bool:
    """Whether a second norm reads the buffer of which `kv_c` is a part, as q_a_layernorm does in q-LoRA models.

    Inductor makes one kernel of both; alone, the other costs as much.
    """
    buffer = storage(norm.kv_c)
    own = {normed, *normed.all_input_nodes, *cone(normed, ops)}

    def reads_buffer(node: fx.Node) -> bool:
        return any(storage(source) == buffer for source in (node, *node.all_input_nodes))

    def is_norm(node: fx.Node) -> bool:
        by_op = ops.rms_norm_out is not None and is_functional(node, ops.rms_norm_out)
        return by_op or node.target in (ops.rms_norm, aten.pow.Tensor_Scalar)

    others = (node for node in normed.graph.nodes if is_norm(node) and node not in own)
    return any(reads_buffer(source) for node in others for source in node.all_input_nodes)
