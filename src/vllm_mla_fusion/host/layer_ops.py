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
    rope_query_in_place: Any


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
    rows, q_pe, kv_c, dtype, key_out, normed_out = _places(op)
    before_cache, is_single = op.before_cache, len(op.outputs) == 1
    layer_context, state_of, overload = layers.layer_context, layer_state.of, kernel.overload

    # Prefill steps outside CUDA graphs wait for these lines in each layer: what can be, is looked up above.
    def run(*values: Any) -> Any:
        layer, kv_cache, slots = layer_context(values[-1])
        state = state_of(layer)
        if state.is_watched:
            state.saw(op, None if q_pe is None else values[q_pe])
        decision = cache = None
        if slots is not None and kv_cache.numel() != 0:
            decision = state.decide(layer, kv_cache, values[dtype], values[kv_c])
            if decision.reason is None:
                cache = slots, kv_cache, decision.kernels_dtype
        given = *values[:before_cache], *(cache or _nowhere(values[kv_c])), *values[dtype + 1 : -1]
        try:
            outputs = overload(op, "fresh")(*given)
        except RuntimeError:
            # Where there is no memory for them, torch says so itself, as torch.OutOfMemoryError.
            op.layer_fake(*values)
            outputs = _run_packed(op, rows, given)
            if outputs is None:
                raise
        if decision is not None and decision.reason is not None:
            latent = values[kv_c] if normed_out is None else outputs[normed_out]
            key = outputs if is_single else outputs[key_out]
            layers.stock_cache_update(latent, key, values[-1], values[dtype], values[dtype + 1])
        return outputs

    return run


def _run_packed(op: Op, rows: list[int], given: tuple[Any, ...]) -> Any:
    """After an error, before which nothing is written: the outputs if rows had to be copied so that their elements lie
    side by side, else None. What Inductor computes itself may reach an op in another layout than traced."""
    apart = [index for index in rows if given[index].stride(-1) != 1]
    if not apart:
        return None
    packed = {index: given[index].contiguous() for index in apart}
    outputs = kernel.overload(op, "fresh")(*[packed.get(index, value) for index, value in enumerate(given)])
    for index in apart:
        if Role.MUTATED in op.layer_arguments[index].roles:
            given[index].copy_(packed[index])
    return outputs


class _Places(NamedTuple):
    """Where among a layer op's arguments and outputs that is what its function looks at."""

    rows: list[int]
    q_pe: int | None
    kv_c: int
    dtype: int
    key_out: int
    normed_out: int | None


def _places(op: Op) -> _Places:
    names, outputs = [each.name for each in op.layer_arguments], [each.name for each in op.outputs]
    return _Places(
        rows=[names.index(name) for name in ("q_pe", "q_c", "k_pe", "kv_c") if name in names],
        q_pe=names.index("q_pe") if "q_pe" in names else None,
        kv_c=names.index("kv_c"),
        dtype=names.index("kv_cache_dtype"),
        key_out=outputs.index("k_pe_out"),
        normed_out=outputs.index("kv_c_normed_out") if "kv_c_normed_out" in outputs else None,
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


def _nowhere(kv_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(slots, cache, its dtype) of a call that writes no cache."""
    return torch.empty(0, dtype=torch.int64, device=kv_c.device), kv_c.new_empty(0), "auto"


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library(kernel.NAMESPACE, "FRAGMENT")


@functools.cache
def register() -> LayerOps:
    """Registers the ops with the layer-name type of the vLLM at hand."""
    writing = {"plain": PLAIN, "norm": NORM, "norms": NORMS}
    ops = {name: _layer_op(op, _function(op)) for name, op in writing.items()}
    in_place = _define(ROPE_QUERY.in_place_schema(), ROPE_QUERY.fake)
    return LayerOps(**ops, rope_query=_layer_op(ROPE_QUERY, _query_function), rope_query_in_place=in_place)


def _layer_op(op: Op, function: Callable[..., Any]) -> Any:
    found = _define(op.layer_schema(layers.layer_name_schema_type()), op.layer_fake)
    for dispatch_key in ("CPU", "CUDA"):
        _library().impl(op.layer_name, function, dispatch_key)
    return found


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    # Any layout of the inputs will do; a copy to a wanted one would take the in-place query away.
    _library().define(schema, tags=(torch.Tag.flexible_layout,))
    name = schema.partition("(")[0]
    _library()._register_fake(name, fake)
    return getattr(getattr(torch.ops, kernel.NAMESPACE), name).default
