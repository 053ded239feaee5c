# SPDX-License-Identifier: Apache-2.0
"""The ops that the pass puts into vLLM's graphs: they find the layer's cache and call the kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.arguments import NORM, PLAIN, Arguments, Op
from vllm_mla_fusion.host import cache_writer, layers, report


@dataclass(frozen=True)
class LayerOps:
    """The ops of this module as OpOverloads."""

    plain: Any
    norm: Any


def _run(op: Op, *values: Any) -> Any:
    """RoPE and the cache write of one MLA layer of the running vLLM engine.

    The layer's cache and slot mapping come from vLLM's forward context. A layer whose cache our kernel may not write is
    rotated here and written by vLLM's own function. Without a slot mapping (profiling run) or cache nothing is written.

    Args:
        values: those of `op.layer_arguments` (see `arguments.Arguments`), and vLLM's name of the layer, as the release
            at hand passes it to its own ops (a string or `LayerName`).

    Returns:
        The op's outputs, each fresh, contiguous and wholly defined: `k_pe_out`, and `kv_c_normed` of the op with norm.
        `q_pe` is rotated in place; `k_pe` is not mutated: vLLM's attention op reads it across a graph partition, and a
        mutated strided view would have to be copied there.

    Raises:
        RuntimeError: an argument does not fit, or there is no forward context.
    """
    *layer_values, layer_name = values
    given = op.bind_layer(*layer_values)
    outputs = op.new_outputs(given)
    target = _write_target(given, layer_name, len(outputs) > 1)
    cache = (target.slots, target.kv_cache, target.kv_cache_dtype, given.kv_cache_scale)
    kernel.overload(op)(*op.kernel_values(values, cache, outputs))
    if target.by_stock:
        latent = outputs[1] if len(outputs) > 1 else given.kv_c
        layers.stock_cache_update(latent, outputs[0], layer_name, given.kv_cache_dtype, given.kv_cache_scale)
    return outputs if len(outputs) > 1 else outputs[0]


@dataclass(frozen=True)
class _Target:
    """Where the kernel writes: nowhere (no slots) if vLLM's own function does it, or nobody."""

    slots: torch.Tensor
    kv_cache: torch.Tensor
    kv_cache_dtype: str
    by_stock: bool


def _write_target(given: Arguments, layer_name: Any, with_norm: bool) -> _Target:
    layer, kv_cache, slot_mapping = layers.layer_context(layer_name)
    if slot_mapping is None or kv_cache.numel() == 0:
        reason = None
    else:
        reason = cache_writer.why_not_replaced(layer, kv_cache, given.kv_cache_dtype, given.kv_c)
        if reason is None:
            report.saw_layer(layer, None, with_norm)
            kernels_dtype = cache_writer.kernel_cache_dtype(given.kv_cache_dtype)
            return _Target(slot_mapping, kv_cache, kernels_dtype, by_stock=False)
    report.saw_layer(layer, reason, with_norm)
    no_slots = torch.empty(0, dtype=torch.int64, device=given.k_pe.device)
    return _Target(no_slots, given.kv_c.new_empty(0), "auto", by_stock=reason is not None)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library(kernel.NAMESPACE, "FRAGMENT")


@functools.cache
def register() -> LayerOps:
    """Registers the ops with the layer-name type of the vLLM at hand."""
    return LayerOps(plain=_define(PLAIN), norm=_define(NORM))


def _define(op: Op) -> Any:
    # Any layout of the inputs will do; a copy to a wanted one would take the in-place query away.
    _library().define(op.layer_schema(layers.layer_name_schema_type()), tags=(torch.Tag.flexible_layout,))
    for dispatch_key in ("CPU", "CUDA"):
        _library().impl(op.layer_name, functools.partial(_run, op), dispatch_key)
    _library()._register_fake(op.layer_name, op.layer_fake)
    return getattr(getattr(torch.ops, kernel.NAMESPACE), op.layer_name).default
