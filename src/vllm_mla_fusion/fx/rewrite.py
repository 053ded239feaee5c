# SPDX-License-Identifier: Apache-2.0
"""Puts the functional form of the fused op into the place of a cache update and its rotary embedding."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from vllm_mla_fusion.fx.memory import is_in_storage_of, writes_to
from vllm_mla_fusion.fx.norm import Norm
from vllm_mla_fusion.fx.ops import FusionOps, arguments, aten, in_order
from vllm_mla_fusion.fx.precision import as_read
from vllm_mla_fusion.fx.query_norm import QueryNorm
from vllm_mla_fusion.fx.reading import fake, shape
from vllm_mla_fusion.fx.rope import Site
from vllm_mla_fusion.fx.transaction import sort


def rewrite(update: fx.Node, site: Site, norm: Norm | None, ops: FusionOps) -> None:
    """Replaces one update. The graph stays functional; what nobody reads any more stays in it."""
    normed, k_rotated, *_ = arguments(update).values()
    latent = {"kv_c": normed} if norm is None else _of_latent(norm)
    outputs = [_new_key(site, k_rotated), *([_like(normed)] if norm is not None else []), _like(site.q_pe)]
    given = {**_rotation(site), "q_pe": site.q_pe, "k_pe": site.k_pe, **latent, **_of_cache(update)}
    op = ops.fused if norm is None else ops.fused_norm
    k_pe_out, *latent_out, q_pe_out = _call(update, auto_functionalized, (op,), given, outputs)
    _replace_key(update, k_rotated, k_pe_out)
    if site.q_rotated is not None:
        site.q_rotated.replace_all_uses_with(as_read(q_pe_out, site.q_rotated))
    update.graph.erase_node(update)
    if norm is not None:
        normed.replace_all_uses_with(latent_out[0])


def rewrite_around_q_b(update: fx.Node, site: Site, norm: Norm, query: QueryNorm, ops: FusionOps) -> None:
    """Replaces one update and both norms by one call before `q_b`, and the query's rotation by one after it.

    The graph is functional and sorted again; what nobody reads any more stays in it.
    """
    graph = update.graph
    normed, k_rotated, *_ = arguments(update).values()
    no_scales = fake(norm.kv_c).new_empty(0, dtype=torch.float32)
    scales = _laid_out_like(query.scales) if query.scales is not None else no_scales
    querys: dict[str, Any] = {"q_c": query.norm.kv_c, "q_c_weight": query.norm.weight, "q_epsilon": query.norm.epsilon}
    querys |= {"q_quant": query.quant, "q_rounds_twice": query.rounds_twice, "q_smallest": query.smallest}
    querys |= {"q_static_scale": query.static_scale, "q_scales_layout": query.scales_layout}
    given = {**_rotation(site), **querys, "k_pe": site.k_pe, **_of_latent(norm), **_of_cache(update)}
    outputs = [_like(query.normed), scales, _new_key(site, k_rotated), _like(normed)]
    q_c_out, q_scales_out, k_pe_out, kv_c_normed_out = _call(update, ops.norms, in_order(ops.norms, given), {}, outputs)
    given = {**_rotation(site), "q_pe": site.q_pe, "layer_name": arguments(update)["layer_name"]}
    _, q_pe_out = _call(update, auto_functionalized, (ops.rope_query,), given, [None, _like(site.q_pe)])
    assert site.q_rotated is not None
    site.q_rotated.replace_all_uses_with(as_read(q_pe_out, site.q_rotated))
    _replace_key(update, k_rotated, k_pe_out)
    graph.erase_node(update)
    normed.replace_all_uses_with(kv_c_normed_out)
    query.normed.replace_all_uses_with(q_c_out)
    if query.scales is not None:
        query.scales.replace_all_uses_with(q_scales_out)
    # The first call stands where the update stood, behind the readers of its results.
    sort(graph)


def _rotation(site: Site) -> dict[str, Any]:
    return {"positions": site.positions, "cos_sin_cache": site.cos_sin_cache, "is_neox": site.is_neox}


def _of_latent(norm: Norm) -> dict[str, Any]:
    return {"kv_c": norm.kv_c, "kv_c_weight": norm.weight, "epsilon": norm.epsilon}


def _of_cache(update: fx.Node) -> dict[str, Any]:
    _, _, layer_name, kv_cache_dtype, k_scale = arguments(update).values()
    return {"kv_cache_dtype": kv_cache_dtype, "kv_cache_scale": k_scale, "layer_name": layer_name}


def _call(
    update: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[torch.Tensor | None]
) -> list[fx.Node]:
    """Calls `target` before the update; nodes that pick its results."""
    graph = update.graph
    with graph.inserting_before(update):
        call = graph.call_function(target, args, kwargs)
        results = [graph.call_function(operator.getitem, (call, index)) for index in range(len(outputs))]
    call.meta["val"] = tuple(outputs)
    for result, value in zip(results, outputs, strict=True):
        result.meta["val"] = value
    return results


def _new_key(site: Site, k_rotated: fx.Node) -> torch.Tensor:
    """`k_pe_out`"""
    num_tokens, rot_dim = fake(k_rotated).shape[0], fake(k_rotated).shape[-1]
    return fake(site.k_pe).new_empty((num_tokens, 1, rot_dim))


def _like(node: fx.Node) -> torch.Tensor:
    """A contiguous value of its own memory."""
    return fake(node).new_empty(fake(node).shape)


def _laid_out_like(node: fx.Node) -> torch.Tensor:
    return fake(node).new_empty_strided(fake(node).shape, fake(node).stride())


def _replace_key(update: fx.Node, k_rotated: fx.Node, k_pe_out: fx.Node) -> None:
    key = k_pe_out if len(shape(k_rotated)) == 3 else _without_heads(k_pe_out, update)
    _allow_input_strides(k_rotated, fake(key))
    k_rotated.replace_all_uses_with(key)
    _allow_output_strides(update.graph, key)
    update.replace_all_uses_with(_empty_part_of(k_pe_out, update))


def _without_heads(k_pe_out: fx.Node, update: fx.Node) -> fx.Node:
    """The kernel's [num_tokens, 1, rot_dim] as [num_tokens, rot_dim]."""
    with update.graph.inserting_before(update):
        key = update.graph.call_function(aten.squeeze.dim, (k_pe_out, 1))
    key.meta["val"] = fake(k_pe_out).squeeze(1)
    return key


def _empty_part_of(k_pe_out: fx.Node, update: fx.Node) -> fx.Node:
    """What the attention op takes in the place of the update's empty result, only to run after it: a view, which costs
    nothing and keeps the fused call alive where nobody else reads its results."""
    with update.graph.inserting_before(update):
        empty = update.graph.call_function(aten.as_strided.default, (k_pe_out, [0], [1], 0))
    empty.meta["val"] = fake(update)
    return empty


def _allow_input_strides(k_rotated: fx.Node, k_value: torch.Tensor) -> None:
    """Where another op reads the key, Inductor would copy it to the strides that this op saw when it was traced."""
    for user in k_rotated.users:
        if not user.meta.get("eager_input_vals"):
            continue
        args, kwargs = user.meta["eager_input_vals"]
        args = tuple(k_value if user.args[i : i + 1] == (k_rotated,) else value for i, value in enumerate(args))
        kwargs = {name: k_value if user.kwargs.get(name) is k_rotated else value for name, value in kwargs.items()}
        user.meta["eager_input_vals"] = (args, kwargs)


def _allow_output_strides(graph: fx.Graph, k_pe_out: fx.Node) -> None:
    """Where the key leaves the graph, Inductor would copy it back to the strides that the view of qkv_a had."""
    output = graph.output_node()
    strides = output.meta.get("original_output_strides")
    outputs = output.args[0]
    if strides is None or not isinstance(outputs, (list, tuple)) or len(strides) != len(outputs):
        return
    strides = list(strides)
    for index, node in enumerate(outputs):
        if node is k_pe_out:
            strides[index] = fake(k_pe_out).stride()
    output.meta["original_output_strides"] = strides


def drop_self_scatters(graph: fx.Graph) -> None:
    """x with its own slice written into it is x (left behind by an in-place op on a slice that is then assigned)."""
    for scatter in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        base, source = scatter.args[:2]
        if is_in_storage_of(source, base) and writes_to(scatter, source):
            assert isinstance(base, fx.Node)
            scatter.replace_all_uses_with(base)
            graph.erase_node(scatter)
