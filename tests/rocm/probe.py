# SPDX-License-Identifier: Apache-2.0
"""Traces stock vLLM's MLA layers on a pretended AMD GPU, with the plugin loaded as vLLM does; prints JSON lines."""

import importlib
import json
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from tests.versions import graphs, hooks, replay, stock_model, tracing
from tests.versions.variants import YARN, Rope, Variant
from vllm_mla_fusion import kernel
from vllm_mla_fusion.host import cache_writer, layers, passes, report

AITER = os.environ.get("VLLM_ROCM_USE_AITER") == "1"
AITER_OP = "vllm::rocm_aiter_triton_rotary_embedding"
FUSED_WITH_NORM = "mla_fusion::fused_norm_concat_and_cache_mla_rope"
DUAL_NORM_OP = "vllm::fused_mla_dual_rms_norm"
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = (
    Rope("default native", DEFAULT),
    Rope("default op", DEFAULT, AITER_OP if AITER else "_C::rotary_embedding"),
    Rope("YaRN native", YARN),
)
IMPLEMENTATIONS = (
    ("rocm_aiter_mla", "AiterMLAImpl"),
    ("aiter_triton_mla", "AiterTritonMLAImpl"),
    ("triton_mla", "TritonMLAImpl"),
    ("rocm_aiter_mla_sparse", "ROCMAiterMLASparseImpl"),
)


def main() -> None:
    # The kernel is not run here.
    patch.multiple(kernel, failure=lambda: None, load=lambda: SimpleNamespace(backend="rocm", archs=["gfx942"])).start()
    load_general_plugins()
    _report("platform", _platform_problems())
    with tempfile.TemporaryDirectory() as scratch:
        for variant in _variants():
            _report(str(variant), _variant_problems(variant, Path(scratch)))
    _report("backends", _backend_problems())


def _variants() -> Iterator[Variant]:
    for rope in ROPES:
        yield Variant("V3", rope, False, "fp8")
    yield Variant("V2-Lite", ROPES[1], True, "auto")
    yield Variant("V3", ROPES[1], False, "fp8", inductor_partition=True)


def _platform_problems() -> Iterator[str]:
    if not current_platform.is_rocm():
        yield f"the platform is {current_platform}"
    if current_platform.get_pass_manager_cls() != f"{passes.__name__}.FusionPassManager":
        yield f"the pass manager is {current_platform.get_pass_manager_cls()}"


def _variant_problems(variant: Variant, scratch: Path) -> Iterator[str]:
    report._left_alone.clear()
    config = stock_model.vllm_config(variant, scratch / "model")
    yield from hooks.config_problems(config)
    if not torch.distributed.is_initialized():
        stock_model.init_single_process(config, scratch / "rendezvous")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    trace = _trace(config, variant, mode)
    yield from _graph_problems(variant, trace)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)
    if AITER:
        with patch.multiple(passes, fuse=lambda graph: None, defunctionalise=lambda graph: None):
            stock = _trace(config, variant, mode)
        yield from _rival_problems(graphs.count(stock.after), graphs.count(trace.after))
    with mode:
        yield from hooks.layer_problems(config, variant.cache_dtype)
        yield from _left_alone_problems(config)


def _trace(config: Any, variant: Variant, mode: FakeTensorMode) -> tracing.Trace:
    config.compilation_config.static_forward_context.clear()
    return tracing.trace_compilation(stock_model.build(config, variant, mode), config, mode)


def _graph_problems(variant: Variant, trace: tracing.Trace) -> Iterator[str]:
    """vLLM may compile a graph for several ranges of sizes; each must be fused."""
    before, after = graphs.count(trace.before), graphs.count(trace.after)
    updates, calls = before[graphs.UPDATE], after[graphs.FUSED] + after[FUSED_WITH_NORM]
    if updates == 0 or updates % stock_model.NUM_LAYERS or calls != updates:
        yield f"{calls} fused calls for {updates} cache updates of {stock_model.NUM_LAYERS} layers"
    expected = updates if variant.rope.custom_op else 0
    for op in ("_C::rotary_embedding", AITER_OP):
        if before[op] != (expected if op == variant.rope.custom_op else 0):
            yield f"{before[op]} x {op} before the pass"
    yield from (f"left over: {after[op]} x {op}" for op in sorted({*graphs.LEFTOVERS, AITER_OP} & after.keys()))
    for pair in zip(trace.before, trace.after, strict=True):
        yield from replay.differences(*pair)


def _rival_problems(stock: Counter[str | None], fused: Counter[str | None]) -> Iterator[str]:
    """vLLM's own AITER fusion of the two norms must happen as often as without the plugin."""
    if fused[DUAL_NORM_OP] != stock[DUAL_NORM_OP]:
        yield f"{fused[DUAL_NORM_OP]} x {DUAL_NORM_OP}, {stock[DUAL_NORM_OP]} without the plugin"
    if fused[DUAL_NORM_OP] and fused[FUSED_WITH_NORM]:
        yield "a latent is normalised by vLLM's fusion and by the plugin"
    print(json.dumps({"dual_norms": stock[DUAL_NORM_OP]}), flush=True)


def _left_alone_problems(config: Any) -> Iterator[str]:
    """A backend that writes the cache itself, fp8_e5m2, and float16 in fp8 stay vLLM's."""
    layer = next(iter(layers.mla_layers(config).values()))
    latent = torch.empty(1, layer.kv_lora_rank, dtype=torch.bfloat16, device="cuda")
    cache = torch.empty(4, 64, layer.head_size, dtype=torch.uint8, device="cuda")
    reason = cache_writer.why_not_replaced(layer, cache, "fp8_e5m2", latent.dtype)
    if reason is None or "fp8_e5m2" not in reason:
        yield f"fp8_e5m2 is not left alone: {reason}"
    reason = cache_writer.why_not_replaced(layer, cache, "fp8", torch.float16)
    if reason is None or "float16" not in reason:
        yield f"float16 in fp8 is not left alone: {reason}"
    own_writer = type("OwnWriterImpl", (type(layer.impl),), {"do_kv_cache_update": lambda self: None})
    with patch.object(layer, "impl", own_writer.__new__(own_writer)):
        reason = cache_writer.why_not_replaced(layer, cache, "fp8", latent.dtype)
    if reason != "OwnWriterImpl has its own cache writer":
        yield f"a backend with its own writer is not left alone: {reason}"


def _backend_problems() -> Iterator[str]:
    """Every MLA backend that ROCm has in this release uses a writer that the kernel may replace."""
    found = 0
    for module, name in IMPLEMENTATIONS:
        try:
            implementation = getattr(importlib.import_module(f"vllm.v1.attention.backends.mla.{module}"), name)
        except (ImportError, AttributeError):
            continue
        found += 1
        if implementation.do_kv_cache_update not in cache_writer._default_writers():
            yield f"{name} has its own cache writer"
    if found < 3:
        yield f"only {found} backends found"


def _report(name: str, problems: Iterator[str]) -> None:
    found = []
    try:
        found.extend(problems)
    except Exception:
        found.append(traceback.format_exc())
    print(json.dumps({"check": name, "problems": found}), flush=True)


if __name__ == "__main__":
    main()
