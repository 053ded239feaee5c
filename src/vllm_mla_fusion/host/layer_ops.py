# SPDX-License-Identifier: Apache-2.0
"""The ops that the pass puts into vLLM's graphs: they find the layer's cache and call the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.arguments import NORM, PLAIN, Op
from vllm_mla_fusion.host import layer_state, layers


@dataclass(frozen=True)
class LayerOps:
    """The ops of this module as OpOverloads."""

    plain: Any
    norm: Any


def _function(op: Op) -> Callable[..., Any]:
    """The Python function of a layer op: RoPE and the cache write of one MLA layer of the running vLLM engine.

    The layer's cache and slot mapping come from vLLM's forward context. A layer whose cache our kernel may not write is
    rotated here and written by vLLM's own function. Without a slot mapping (profiling run) or cache nothing is written.

    Returns:
        A function of `op.layer_arguments` (see `arguments.Arguments`) and vLLM's name of the layer, as the release at
        hand passes it to its own ops (a string or `LayerName`). It returns the op's outputs, each fresh, contiguous and
        wholly defined: `k_pe_out`, and `kv_c_normed` of the op with norm. `q_pe` is rotated in place; `k_pe` is not
        mutated: vLLM's attention op reads it across a graph partition, and a mutated strided view would have to be
        copied there. RuntimeError: an argument does not fit, or there is no forward context.
    """
    names = [each.name for each in op.layer_arguments]
    q_pe, k_pe, kv_c = map(names.index, ("q_pe", "k_pe", "kv_c"))
    dtype, scale = map(names.index, ("kv_cache_dtype", "kv_cache_scale"))
    before_cache, new_outputs = op.before_cache, op.new_outputs
    has_norm = len(op.outputs) > 1
    layer_context, state_of = layers.layer_context, layer_state.of

    # Prefill steps outside CUDA graphs wait for these lines in each layer: what can be, is looked up above.
    def run(*values: Any) -> Any:
        outputs = new_outputs(values)
        layer, kv_cache, slots = layer_context(values[-1])
        state = state_of(layer)
        if state.is_watched:
            state.saw(op, values[q_pe])
        is_stock, kernels_dtype = False, "auto"
        if slots is not None and kv_cache.numel() != 0:
            decision = state.decide(layer, kv_cache, values[dtype], values[kv_c])
            is_stock, kernels_dtype = decision.reason is not None, decision.kernels_dtype
        if is_stock or slots is None or kv_cache.numel() == 0:
            slots, kv_cache, kernels_dtype = *_nowhere(values[kv_c]), "auto"
        given = values[:before_cache]
        if not values[q_pe].stride(-1) == values[k_pe].stride(-1) == values[kv_c].stride(-1) == 1:
            given = _packed(given)
        kernel.overload(op)(*given, slots, kv_cache, kernels_dtype, values[scale], *outputs)
        if given[q_pe] is not values[q_pe]:
            values[q_pe].copy_(given[q_pe])
        if is_stock:
            latent = outputs[1] if has_norm else values[kv_c]
            layers.stock_cache_update(latent, outputs[0], values[-1], values[dtype], values[scale])
        return outputs if has_norm else outputs[0]

    return run


def _packed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Contiguous: what Inductor computes itself may reach an op in another layout than traced."""
    return tuple(each.contiguous() if isinstance(each, torch.Tensor) else each for each in values)


def _nowhere(kv_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, cache) of a call that writes no cache."""
    return torch.empty(0, dtype=torch.int64, device=kv_c.device), kv_c.new_empty(0)


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
    function = _function(op)
    for dispatch_key in ("CPU", "CUDA"):
        _library().impl(op.layer_name, function, dispatch_key)
    _library()._register_fake(op.layer_name, op.layer_fake)
    return getattr(getattr(torch.ops, kernel.NAMESPACE), op.layer_name).default
