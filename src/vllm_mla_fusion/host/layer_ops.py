# SPDX-License-Identifier: Apache-2.0
"""The ops that the pass puts into vLLM's graphs: they find the layer's cache and call the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.arguments import NORM, NORMS, PLAIN, ROPE_QUERY, Op, Role
from vllm_mla_fusion.host import layer_state, layers


@dataclass(frozen=True)
class LayerOps:
    """The ops of this module as OpOverloads."""

    plain: Any
    norm: Any
    norms: Any
    rope_query: Any


def _function(op: Op) -> Callable[..., Any]:
    """The Python function of a layer op that writes a cache: RoPE and the cache write of one MLA layer of the running
    vLLM engine.

    The layer's cache and slot mapping come from vLLM's forward context. A layer whose cache our kernel may not write is
    rotated here and written by vLLM's own function. Without a slot mapping (profiling run) or cache nothing is written.

    Returns:
        A function of `op.layer_arguments` (see `arguments.Arguments`) and vLLM's name of the layer, as the release at
        hand passes it to its own ops (a string or `LayerName`). It returns the op's outputs, each fresh, contiguous
        but for scales, and wholly defined. `q_pe` is rotated in place; `k_pe` is not mutated: vLLM's attention op reads
        it across a graph partition, and a mutated strided view would have to be copied there. RuntimeError: an argument
        does not fit, or there is no forward context.
    """
    rows, q_pe, kv_c, dtype, scale, after_cache, key_out, normed_out, has_scales = _places(op)
    before_cache, new_outputs = op.before_cache, op.new_outputs
    layer_context, state_of = layers.layer_context, layer_state.of

    # Prefill steps outside CUDA graphs wait for these lines in each layer: what can be, is looked up above.
    def run(*values: Any) -> Any:
        outputs = new_outputs(values)
        layer, kv_cache, slots = layer_context(values[-1])
        state = state_of(layer)
        if state.is_watched:
            state.saw(op, None if q_pe is None else values[q_pe])
        is_stock, kernels_dtype = False, "auto"
        if slots is not None and kv_cache.numel() != 0:
            decision = state.decide(layer, kv_cache, values[dtype], values[kv_c])
            is_stock, kernels_dtype = decision.reason is not None, decision.kernels_dtype
        if is_stock or slots is None or kv_cache.numel() == 0:
            slots, kv_cache, kernels_dtype = *_nowhere(values[kv_c]), "auto"
        given = values[:before_cache]
        if any(values[index].stride(-1) != 1 for index in rows):
            given = _packed(given)
        taken = _without_empty(outputs) if has_scales else outputs
        cache = (slots, kv_cache, kernels_dtype, values[scale])
        kernel.overload(op)(*given, *cache, *values[after_cache], *taken)
        if q_pe is not None and given[q_pe] is not values[q_pe]:
            values[q_pe].copy_(given[q_pe])
        if is_stock:
            latent = values[kv_c] if normed_out is None else outputs[normed_out]
            layers.stock_cache_update(latent, outputs[key_out], values[-1], values[dtype], values[scale])
        return outputs if len(outputs) > 1 else outputs[0]

    return run


class _Places(NamedTuple):
    """Where among a layer op's arguments and outputs that is what its function looks at."""

    rows: list[int]
    q_pe: int | None
    kv_c: int
    dtype: int
    scale: int
    after_cache: slice
    key_out: int
    normed_out: int | None
    has_scales: bool


def _places(op: Op) -> _Places:
    names, outputs = [each.name for each in op.layer_arguments], [each.name for each in op.outputs]
    scale = names.index("kv_cache_scale")
    return _Places(
        rows=[names.index(name) for name in ("q_pe", "q_c", "k_pe", "kv_c") if name in names],
        q_pe=names.index("q_pe") if "q_pe" in names else None,
        kv_c=names.index("kv_c"),
        dtype=names.index("kv_cache_dtype"),
        scale=scale,
        after_cache=slice(scale + 1, sum(Role.FOR_OUTPUT not in each.roles for each in op.layer_arguments)),
        key_out=outputs.index("k_pe_out"),
        normed_out=outputs.index("kv_c_normed_out") if "kv_c_normed_out" in outputs else None,
        has_scales="q_scales_out" in outputs,
    )


def _query_function(positions: Any, q_pe: Any, cos_sin_cache: Any, is_neox: bool, layer_name: Any) -> None:
    """The Python function of the layer op after `q_b`: rotates `q_pe` in place, see `arguments.Arguments`."""
    state = layer_state.of(layers.layer_context(layer_name)[0])
    if state.is_watched:
        state.saw(ROPE_QUERY, q_pe)
    packed = q_pe if q_pe.stride(-1) == 1 else q_pe.contiguous()
    kernel.overload(ROPE_QUERY)(positions, packed, cos_sin_cache, is_neox)
    if packed is not q_pe:
        q_pe.copy_(packed)


def _without_empty(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    """An op of a graph returns tensors only: one without elements of a row stands for the scales that there are not."""
    return tuple([None if each.dim() == 1 else each for each in outputs])


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
    writing = {"plain": PLAIN, "norm": NORM, "norms": NORMS}
    ops = {name: _define(op, _function(op)) for name, op in writing.items()}
    return LayerOps(**ops, rope_query=_define(ROPE_QUERY, _query_function))


def _define(op: Op, function: Callable[..., Any]) -> Any:
    # Any layout of the inputs will do; a copy to a wanted one would take the in-place query away.
    _library().define(op.layer_schema(layers.layer_name_schema_type()), tags=(torch.Tag.flexible_layout,))
    for dispatch_key in ("CPU", "CUDA"):
        _library().impl(op.layer_name, function, dispatch_key)
    _library()._register_fake(op.layer_name, op.layer_fake)
    return getattr(getattr(torch.ops, kernel.NAMESPACE), op.layer_name).default
