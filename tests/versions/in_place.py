# SPDX-License-Identifier: Apache-2.0
"""The counter-proof: were the key rotated in place, Inductor would copy it in every layer, and `codegen` would see it.

Native RoPE gives vLLM's attention op a contiguous key when it is traced. Until 0.21 that op has no tag
`flexible_layout`, so Inductor copies the strided key that takes its place. It does so in the Inductor partition only:
the default one has no attention in its graphs. A RoPE op that works in place gives a strided key from the start, for
which nothing is copied; nor is it if the pass also rewrites the strides that attention was traced with.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from vllm_mla_fusion.fx import fusion, in_place, rewrite
from vllm_mla_fusion.fx.ops import FusionOps, result_of
from vllm_mla_fusion.host import layers

from . import codegen, graphs
from .stock_model import NUM_LAYERS
from .tracing import Trace

NAME = "in_place_fused_concat_and_cache_mla_rope"
LIBRARY = torch.library.Library("mla_fusion_tests", "FRAGMENT")


@contextmanager
def pass_that_rotates_in_place() -> Iterator[None]:
    """The plugin's pass finds what it always finds, and puts in the op that mutates `k_pe` and returns nothing."""
    op = getattr(torch.ops.mla_fusion_tests, NAME, None) or _define()

    def rewrite_with_two(update: fx.Node, site: Any, norm: None, ops: FusionOps) -> None:
        _rewrite(update.graph, update, site, op.default)

    def defunctionalise(graph: fx.Graph, ops: FusionOps) -> in_place.InPlaceResult:
        for node in graph.find_nodes(op="call_function", target=auto_functionalized):
            if node.args[0] is op.default:
                _call_in_place(graph, node)
        return in_place.InPlaceResult()

    with (
        patch.object(fusion, "rewrite", rewrite_with_two),
        patch.object(fusion.querys_norm, "match", lambda *_: None),
        patch.object(in_place, "defunctionalise", defunctionalise),
    ):
        yield


def problems_of(trace: Trace) -> Iterator[str]:
    """Whether the copies that `codegen` finds are those of the key, one a layer, and none with a later vLLM."""
    yield from graphs.other_meaning(trace)
    any_layout = torch.Tag.flexible_layout in torch.ops.vllm.unified_mla_attention_with_output.default.tags
    expected = 0 if any_layout else NUM_LAYERS
    found = list(codegen.copies(trace.code))
    if [problem.startswith(codegen.KEY_IS_COPIED) for problem in found] != [True] * expected:
        yield f"{expected} copies of a key that was rotated in place expected, found {found}"


def _define() -> Any:
    tensors = "Tensor positions, Tensor(a!) q_pe, Tensor(b!) k_pe, Tensor kv_c, Tensor cos_sin_cache"
    rest = f"bool is_neox, str kv_cache_dtype, Tensor kv_cache_scale, {layers.layer_name_schema_type()} layer_name"
    LIBRARY.define(f"{NAME}({tensors}, {rest}) -> ()", tags=(torch.Tag.flexible_layout,))
    LIBRARY._register_fake(NAME, lambda *args, **kwargs: None)
    return getattr(torch.ops.mla_fusion_tests, NAME)


def _rewrite(graph: fx.Graph, update: fx.Node, site: Any, op: Any) -> None:
    kv_c, k_rotated, layer_name, kv_cache_dtype, kv_cache_scale = update.args
    arguments = {
        "positions": site.positions,
        "q_pe": site.q_pe,
        "k_pe": site.k_pe,
        "kv_c": kv_c,
        "cos_sin_cache": site.cos_sin_cache,
        "is_neox": site.is_neox,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_scale": kv_cache_scale,
        "layer_name": layer_name,
    }
    with graph.inserting_before(update):
        fused = graph.call_function(auto_functionalized, (op,), arguments)
        q_pe, k_pe = (graph.call_function(operator.getitem, (fused, index)) for index in (1, 2))
    for result, source in ((q_pe, site.q_pe), (k_pe, site.k_pe)):
        value = source.meta["val"]
        result.meta["val"] = value.new_empty_strided(value.shape, value.stride())
    fused.meta["val"] = (None, q_pe.meta["val"], k_pe.meta["val"])
    k_rotated.replace_all_uses_with(k_pe)
    update.replace_all_uses_with(rewrite._empty_part_of(k_pe, update))
    if site.q_rotated is not None:
        site.q_rotated.replace_all_uses_with(q_pe)
    graph.erase_node(update)


def _call_in_place(graph: fx.Graph, fused: fx.Node) -> None:
    with graph.inserting_before(fused):
        graph.call_function(fused.args[0], (), dict(fused.kwargs))
    for index, name in ((1, "q_pe"), (2, "k_pe")):
        result, source = result_of(fused, index), fused.kwargs[name]
        if result is None:
            continue
        for node, replacement in (*in_place._scatters_of(result, source), (result, source)):
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    graph.erase_node(fused)
