# SPDX-License-Identifier: Apache-2.0
"""What must hold for a whole model: every MLA layer is fused, nothing is copied for it, and all else is as in stock."""

from collections.abc import Iterator
from pathlib import Path

from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import VllmConfig
from vllm.model_executor.models import registry

from vllm_mla_fusion.host import layers, report

from . import checkpoints, codegen, decoder, graphs, replay, tracing, world
from .configurations import DEFAULT, Case
from .limits import NOT_COMPILED
from .models import DEEPSEEK_V3
from .tracing import Trace

# Whose `q_b` is a kernel that reads the query's norm as it is, or as an op or a given scale has quantised it.
_READ_BY_KERNELS = (checkpoints.UNQUANTISED, checkpoints.FP8_BLOCK, checkpoints.INT4_ALL)
_GIVEN_SCALES = (checkpoints.FP8_STATIC, checkpoints.FP8_TENSOR, checkpoints.FP8_MODELOPT)
BOTH_NORMS = {Case(DEEPSEEK_V3, each, DEFAULT) for each in (*_READ_BY_KERNELS, *_GIVEN_SCALES)}


def problems_of_case(case: Case, scratch: Path, graphs_folder: Path | None) -> Iterator[str]:
    """Traces the case's model; what is wrong with it."""
    report._left_alone.clear()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with decoder.pretended(case):
        config = decoder.vllm_config(case, scratch)
        world.enter(config)
        with decoder.as_in_worker(config):
            model = decoder.build(config, case, mode)
            expected = registry._VLLM_MODELS[case.model.architecture][1]
            if expected not in [each.__name__ for each in type(model).__mro__]:
                yield f"the model is a {type(model).__name__}, expected {expected}"
            if not decoder.is_compiled(model):
                yield NOT_COMPILED
                return
            trace = tracing.trace_compilation(model, config, mode, decoder.inputs)
    if graphs_folder is not None:
        trace.write(graphs_folder / f"{case}.txt")
    yield from problems_of(config, trace, case.model.num_mla_layers)
    ops = graphs.count(trace.after)
    if case in BOTH_NORMS and ops[graphs.FUSED_WITH_BOTH] != graphs.count(trace.before)[graphs.UPDATE]:
        yield f"{ops[graphs.FUSED_WITH_BOTH]} calls have both norms"


def problems_of(config: VllmConfig, trace: Trace, num_layers: int) -> Iterator[str]:
    """What is wrong; the first line says how many layers are fused if not all are."""
    found = len(layers.mla_layers(config))
    if found != num_layers:
        yield f"the model has {found} MLA layers, expected {num_layers}"
    yield from problems_of_graphs(config, trace, num_layers)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)
    yield from codegen.copies(trace.code, graphs.count(trace.before)[graphs.UPDATE])


def problems_of_graphs(config: VllmConfig, trace: Trace, num_layers: int) -> Iterator[str]:
    """Cache updates that are not fused in place, and what the graphs compute otherwise than stock vLLM's."""
    yield from _fused(config, trace, num_layers)
    for stock, after in zip(trace.stock, trace.after, strict=True):
        yield from replay.differences(stock, after)


def _fused(config: VllmConfig, trace: Trace, num_layers: int) -> Iterator[str]:
    # vLLM may compile a graph for several ranges of sizes.
    updates = graphs.count(trace.before)[graphs.UPDATE]
    if updates == 0 or updates % num_layers:
        yield f"{updates} cache updates in the graphs of {num_layers} MLA layers"
    calls = graphs.writers(trace.after)
    yield from graphs.around_q_b_problems(trace.after)
    if len(calls) != updates or graphs.count(trace.after)[graphs.UPDATE]:
        yield f"{len(calls)} of {updates} cache updates are fused"
    for call in calls:
        if call.target is auto_functionalized:
            yield f"{call.name} is not in place"
    dtypes = {graphs.given_to(call)["kv_cache_dtype"] for call in calls}
    if not dtypes <= {layer.kv_cache_dtype for layer in layers.mla_layers(config).values()}:
        yield f"the calls have kv_cache_dtype {dtypes}"
