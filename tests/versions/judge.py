# SPDX-License-Identifier: Apache-2.0
"""What must hold for a whole model: every MLA layer is fused, nothing is copied for it, and all else is as in stock."""

from collections.abc import Iterator

from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.config import VllmConfig

from vllm_mla_fusion.host import layers, report

from . import codegen, graphs, replay
from .tracing import Trace


def problems_of(config: VllmConfig, trace: Trace, num_layers: int) -> Iterator[str]:
    """What is wrong; the first line says how many layers are fused if not all are."""
    found = len(layers.mla_layers(config))
    if found != num_layers:
        yield f"the model has {found} MLA layers, expected {num_layers}"
    yield from _fused(config, trace, num_layers)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)
    for stock, after in zip(trace.stock, trace.after, strict=True):
        yield from replay.differences(stock, after)
    yield from codegen.copies(trace.code, num_layers)


def _fused(config: VllmConfig, trace: Trace, num_layers: int) -> Iterator[str]:
    updates = graphs.count(trace.before)[graphs.UPDATE]
    if updates != num_layers:
        yield f"{updates} cache updates in the graphs, expected {num_layers}"
    calls = [
        node
        for graph in trace.after
        for node in graph.nodes
        if graphs.op_name(node) in (graphs.FUSED, graphs.FUSED_WITH_NORM)
    ]
    if len(calls) != num_layers or graphs.count(trace.after)[graphs.UPDATE]:
        yield f"{len(calls)} of {num_layers} MLA layers are fused"
    for call in calls:
        if call.target is auto_functionalized:
            yield f"{call.name} is not in place"
    dtypes = {call.kwargs["kv_cache_dtype"] for call in calls}
    if not dtypes <= {layer.kv_cache_dtype for layer in layers.mla_layers(config).values()}:
        yield f"the calls have kv_cache_dtype {dtypes}"
