# SPDX-License-Identifier: Apache-2.0
"""What must hold for the graphs of a trace: the stock form went in, and one fused call per layer came out."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from vllm_mla_fusion.fx.ops import arguments

from . import replay
from .stock_model import NUM_LAYERS
from .tracing import Trace
from .variants import GEOMETRIES, Variant

UPDATE = "vllm::unified_mla_kv_cache_update"
FUSED = "mla_fusion::fused_concat_and_cache_mla_rope"
# Of a model without q-LoRA, whose latent's norm would be a kernel of its own.
FUSED_WITH_NORM = "mla_fusion::fused_norm_concat_and_cache_mla_rope"
# Of a model with q-LoRA on the GPU that is pretended: one op before q_b and one after it.
FUSED_WITH_BOTH = "mla_fusion::fused_norms_rope_concat_and_cache_mla"
ROPE_QUERY = "mla_fusion::fused_rope_query_in_place"
WRITERS = (FUSED, FUSED_WITH_NORM, FUSED_WITH_BOTH)

# All of these are in a stock graph only for the sake of RoPE and of putting the rotated query back into its buffer.
LEFTOVERS = {
    UPDATE,
    "_C::rotary_embedding",
    "vllm::flashinfer_rotary_embedding",
    "vllm::fused_rope_unified_mla_kv_cache_update",
    "aten::copy",
    "aten::index",
    "aten::slice_scatter",
}


def problems_of(variant: Variant, trace: Trace) -> list[str]:
    """What is wrong with a trace of the variant; empty if nothing is."""
    return [
        *_problems_before(variant, trace.before),
        *_leftovers(trace.after, LEFTOVERS - {UPDATE}),
        *fused_problems(variant, trace.after),
        *other_meaning(trace),
    ]


def other_meaning(trace: Trace) -> Iterator[str]:
    """What the graphs compute otherwise than before the pass."""
    for before, after in zip(trace.before, trace.after, strict=True):
        yield from replay.differences(before, after)


def _problems_before(variant: Variant, graphs: list[fx.Graph]) -> Iterator[str]:
    ops = count(graphs)
    if ops[UPDATE] != NUM_LAYERS:
        yield f"{ops[UPDATE]} cache updates before the pass, expected {NUM_LAYERS}"
    for op in ("_C::rotary_embedding", "vllm::flashinfer_rotary_embedding"):
        expected = NUM_LAYERS if op == variant.rope.custom_op else 0
        if ops[op] != expected:
            yield f"{ops[op]} x {op} before the pass, expected {expected}"


def _leftovers(graphs: list[fx.Graph], unwanted: set[str]) -> Iterator[str]:
    ops = count(graphs)
    yield from (f"left over: {ops[op]} x {op}" for op in sorted(unwanted & ops.keys()))


def fused_problems(variant: Variant, graphs: list[fx.Graph]) -> Iterator[str]:
    """What is wrong with the cache updates after the pass: there is one fused call in place for each layer."""
    yield from _leftovers(graphs, {UPDATE})
    calls = writers(graphs)
    if [op_name(call) for call in calls] != [expected_op(variant)] * NUM_LAYERS:
        yield f"fused calls {[op_name(call) for call in calls]}, expected {NUM_LAYERS} x {expected_op(variant)}"
    yield from around_q_b_problems(graphs)
    for call in calls:
        if call.target is auto_functionalized:
            yield f"{call.name} is not in place"
        given = given_to(call)
        if given["is_neox"] is not variant.is_neox:
            yield f"{call.name} has is_neox={given['is_neox']}"
        if given["kv_cache_dtype"] != variant.cache_dtype:
            yield f"{call.name} has kv_cache_dtype={given['kv_cache_dtype']}"


def expected_op(variant: Variant) -> str:
    """Which op takes the place of a layer's cache update."""
    if GEOMETRIES[variant.geometry]["q_lora_rank"] is None:
        return FUSED_WITH_NORM
    return FUSED if variant.is_neox else FUSED_WITH_BOTH


def writers(graphs: list[fx.Graph]) -> list[fx.Node]:
    """The calls that took the place of cache updates."""
    return [node for graph in graphs for node in graph.nodes if op_name(node) in WRITERS]


def given_to(call: fx.Node) -> dict[str, Any]:
    """A writer's arguments, also through auto_functionalized."""
    return dict(call.kwargs) if call.target is auto_functionalized else arguments(call)


def around_q_b_problems(graphs: list[fx.Graph]) -> Iterator[str]:
    """Whether for each op before q_b there is one after it, in place."""
    queries = [node for graph in graphs for node in graph.nodes if op_name(node) == ROPE_QUERY]
    if len(queries) != count(graphs)[FUSED_WITH_BOTH]:
        yield f"{len(queries)} x {ROPE_QUERY} for {count(graphs)[FUSED_WITH_BOTH]} x {FUSED_WITH_BOTH}"
    yield from (f"{node.name} is not in place" for node in queries if node.target is auto_functionalized)


def count(graphs: list[fx.Graph]) -> Counter[str | None]:
    return Counter(op_name(node) for graph in graphs for node in graph.nodes)


def op_name(node: fx.Node) -> str | None:
    """The op that a node calls, also through auto_functionalized."""
    target = node.args[0] if node.target is auto_functionalized else node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else None
