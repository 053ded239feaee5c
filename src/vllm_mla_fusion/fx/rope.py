# SPDX-License-Identifier: Apache-2.0
"""Recognises RoPE: of what the cached key is the rotation, by which positions and angles, and which query goes with it.

What lies between the key and its source is not compared with a pattern but evaluated: on small random float64 tensors
it must equal the rotation of the source, in GPT-J or in GPT-NeoX pairing. So every form that a vLLM release, a torch
version or a custom op gives to RoPE is recognised, and anything that computes something else is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from vllm_mla_fusion.fx.memory import may_overlap
from vllm_mla_fusion.fx.ops import (
    ACTIVATION_DTYPES,
    EVALUABLE,
    FusionOps,
    result_of,
    rotary_op,
)
from vllm_mla_fusion.fx.precision import is_only_read_as, unwidened
from vllm_mla_fusion.fx.probe import Probe
from vllm_mla_fusion.fx.reading import (
    NoMatchError,
    ancestors,
    attention_of,
    closure,
    cone,
    downstream,
    fake,
    gather,
    numel,
    shape,
)


@dataclass(frozen=True)
class Site:
    """One cache update and the rotary embedding before it."""

    positions: fx.Node
    cos_sin_cache: fx.Node
    is_neox: bool
    k_pe: fx.Node
    q_pe: fx.Node
    q_rotated: fx.Node | None


class NoRopeError(Exception):
    """There is nothing to fuse with the cache update."""


def match(update: fx.Node, kv_c: fx.Node, k_rotated: fx.Node, ops: FusionOps) -> Site:
    """The site of a cache update of the latent `kv_c` and the key `k_rotated`.

    Raises:
        NoMatchError: the fused op cannot take its place; the reason.
        NoRopeError: no rotary embedding leads to the key.
    """
    key_cone = cone(k_rotated, ops)
    rotary = [node for node in key_cone if rotary_op(node, ops)]
    gathers = [node for node in key_cone if gather(node)]
    origins = _origins(k_rotated, ops)
    if not origins:
        raise NoRopeError
    if len(rotary) == 1 and not gathers:
        site = _match_rotary_op(k_rotated, rotary[0], ops)
    elif len(gathers) == 1 and not rotary:
        site = _match_native(update, k_rotated, key_cone, gathers[0], ops)
    elif all(node.op == "placeholder" for node in origins):
        raise NoMatchError(
            "the rotary embedding of its key is in another graph, beyond a splitting op such as a sparse indexer; "
            "start vLLM with use_inductor_graph_partition=True in the compilation config to have both in one"
        )
    else:
        raise NoMatchError("the key that is cached does not come from one rotary embedding")
    site = _with_narrow_table(site)
    _check_tensors(site, kv_c, k_rotated)
    inputs = [site.positions, site.cos_sin_cache, site.q_pe, site.k_pe, kv_c]
    if not {update, k_rotated, site.q_rotated}.isdisjoint(ancestors(*inputs)):
        raise NoMatchError("what the rotary embedding reads is computed from its own results")
    fake(update)
    return site


def _origins(key: fx.Node, ops: FusionOps) -> list[fx.Node]:
    """What may have rotated the key: rotary ops, rows of a table, and values of another graph, one for each token.

    Looks through torch's own ops, and no further than what is larger than the key: the qkv_a GEMM.
    """
    size = numel(key)

    def sources(node: fx.Node) -> list[fx.Node]:
        is_torchs = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "prims")
        looks_through = node.target in EVALUABLE or (is_torchs and numel(node) <= size)
        return node.all_input_nodes if looks_through and gather(node) is None else []

    return [
        node
        for node in closure([key], sources)
        if gather(node) or rotary_op(node, ops) or (node.op == "placeholder" and shape(node)[:1] == shape(key)[:1])
    ]


def _match_rotary_op(k_rotated: fx.Node, node: fx.Node, ops: FusionOps) -> Site:
    op = rotary_op(node, ops)
    assert op is not None
    kwargs = node.kwargs
    if kwargs.get("rope_dim_offset") or kwargs.get("inverse") or kwargs.get("offsets") is not None:
        raise NoMatchError("the rotary op rotates another part of the head, backwards, or by other positions")
    key, query = kwargs["key"], kwargs["query"]
    if not isinstance(key, fx.Node) or not isinstance(query, fx.Node):
        raise NoMatchError("the rotary op has no key or no query")
    if kwargs["head_size"] != shape(key)[-1]:
        raise NoMatchError("the rotary op rotates only a part of the head")
    _check_feeds_only(result_of(node, 2), k_rotated)
    positions, cos_sin_cache, is_neox = kwargs["positions"], kwargs["cos_sin_cache"], kwargs[op.is_neox]
    assert isinstance(positions, fx.Node)
    assert isinstance(cos_sin_cache, fx.Node)
    if not Probe(positions, cos_sin_cache, ops).is_rotation(k_rotated, key, bool(is_neox)):
        raise NoMatchError("the key that is cached is not the rotary op's key")
    return Site(positions, cos_sin_cache, bool(is_neox), unwidened(key), unwidened(query), result_of(node, 1))


def _match_native(update: fx.Node, k_rotated: fx.Node, key_cone: list[fx.Node], rows: fx.Node, ops: FusionOps) -> Site:
    cos_sin_cache, positions = gather(rows) or (rows, rows)
    probe = Probe(positions, cos_sin_cache, ops)
    key = _source(probe, k_rotated, key_cone, rows, ops)
    if key is None:
        raise NoMatchError("what lies between the key and the cache is not a rotary embedding")
    k_pe, is_neox = key
    attention = attention_of(update)
    queries: list[Site] = []
    of_the_key = {*key_cone, *closure([k_rotated], lambda node: node.users)}
    for q_rotated in downstream(rows):
        # A query that nobody reads any more is another layer's, fused before.
        if q_rotated in of_the_key or len(shape(q_rotated)) != 3 or not q_rotated.users:
            continue
        if any(found.q_rotated in ancestors(q_rotated) for found in queries):
            continue
        query = _source(probe, q_rotated, cone(q_rotated, ops), rows, ops, is_neox)
        if query is not None:
            queries.append(Site(positions, cos_sin_cache, is_neox, k_pe, query[0], q_rotated))
    if attention is not None and len(queries) > 1:
        queries = [site for site in queries if site.q_rotated in ancestors(attention)]
    if len(queries) != 1:
        raise NoMatchError(f"one rotated query is expected beside the key, found {len(queries)}")
    return queries[0]


def _source(
    probe: Probe, rotated: fx.Node, its_cone: list[fx.Node], rows: fx.Node, ops: FusionOps, is_neox: bool | None = None
) -> tuple[fx.Node, bool] | None:
    """The node of which `rotated` is the rotation, and its pairing."""
    wanted = shape(rotated)
    for candidate in its_cone:
        if candidate is rotated or shape(candidate) not in (wanted, (wanted[0], *wanted[2:])):
            continue
        if rows in cone(candidate, ops):
            continue
        for pairing in (False, True) if is_neox is None else (is_neox,):
            if probe.is_rotation(rotated, candidate, pairing):
                return unwidened(candidate), pairing
    return None


def _with_narrow_table(site: Site) -> Site:
    """With the table as it was before it was converted for this step, if the kernel reads it so."""
    table = unwidened(site.cos_sin_cache)
    return replace(site, cos_sin_cache=table) if fake(table).dtype in (fake(site.q_pe).dtype, torch.float32) else site


def _check_tensors(site: Site, kv_c: fx.Node, k_rotated: fx.Node) -> None:
    """The kernel's requirements that a graph can show; the rest is checked at run time."""
    dtype = fake(site.q_pe).dtype
    if dtype not in ACTIVATION_DTYPES:
        raise NoMatchError(f"activations of {dtype} are not supported")
    if dtype != fake(site.k_pe).dtype:
        raise NoMatchError(f"q_pe has dtype {dtype} and k_pe {fake(site.k_pe).dtype}, one dtype of both is needed")
    for name, node, dtypes in (
        ("q_pe", site.q_pe, (dtype,)),
        ("k_pe", site.k_pe, (dtype,)),
        ("kv_c_normed", kv_c, (dtype,)),
        ("cos_sin_cache", site.cos_sin_cache, (dtype, torch.float32)),
        ("positions", site.positions, (torch.int32, torch.int64)),
    ):
        value = fake(node)
        if value.dtype not in dtypes or value.stride(-1) != 1:
            needed = " or ".join(map(str, dtypes))
            found = f"dtype {value.dtype} and last stride {value.stride(-1)}"
            raise NoMatchError(f"{name} has {found}, needs {needed} and 1")
    for name, rotated in (("query", site.q_rotated), ("key", k_rotated)):
        if rotated is not None and fake(rotated).dtype != dtype and not is_only_read_as(rotated, dtype):
            raise NoMatchError(f"the rotated {name} is read as {fake(rotated).dtype}, the kernel writes {dtype}")
    _check_shapes(site, k_rotated)
    _check_memory(site, kv_c)


def _check_shapes(site: Site, k_rotated: fx.Node) -> None:
    if len(shape(site.q_pe)) != 3 or len(shape(site.positions)) != 1:
        raise NoMatchError("q_pe must be [num_tokens, num_heads, rot_dim] and positions [num_tokens]")
    (num_tokens,), rot_dim = shape(site.positions), shape(site.q_pe)[-1]
    for name, node in (("k_pe", site.k_pe), ("the rotated key", k_rotated)):
        if shape(node) not in ((num_tokens, 1, rot_dim), (num_tokens, rot_dim)):
            found = tuple(fake(node).shape)
            raise NoMatchError(f"{name} has shape {found}, needs [num_tokens, 1, {rot_dim}] or [num_tokens, {rot_dim}]")
    if shape(site.cos_sin_cache)[1:] != (rot_dim,):
        found = tuple(fake(site.cos_sin_cache).shape)
        raise NoMatchError(f"cos_sin_cache has shape {found}, needs [max_position, {rot_dim}]")


def _check_memory(site: Site, kv_c: fx.Node) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(shape(site.q_pe), fake(site.q_pe).stride(), strict=True)):
        raise NoMatchError("q_pe is expanded: heads or tokens that share memory cannot be rotated in place")
    for name, node in (("k_pe", site.k_pe), ("kv_c_normed", kv_c)):
        if may_overlap(node, site.q_pe):
            raise NoMatchError(f"{name} shares memory with q_pe, which is rotated in place")


def _check_feeds_only(start: fx.Node | None, goal: fx.Node) -> None:
    """Every reader of `start` must sit on a way to `goal`, else removing the rotary op would take its value away."""
    pending = [start] if start is not None else []
    while pending:
        node = pending.pop()
        if node is goal:
            continue
        if node.op == "output" or node.target not in EVALUABLE:
            raise NoMatchError("the rotated key has another reader than the cache")
        pending.extend(node.users)
