# SPDX-License-Identifier: Apache-2.0
"""The ops that the pass puts into vLLM's graphs: they find the layer's cache and call the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.host import cache_writer, layers, report

_NAME = "fused_concat_and_cache_mla_rope"
_NORM_NAME = "fused_norm_concat_and_cache_mla_rope"


@dataclass(frozen=True)
class LayerOps:
    """The two ops of this module as OpOverloads."""

    plain: Any
    norm: Any


def fused_concat_and_cache_mla_rope(
    positions: torch.Tensor,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    kv_c: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache_dtype: str,
    kv_cache_scale: torch.Tensor,
    layer_name: Any,
) -> torch.Tensor:
    """RoPE on `q_pe` and `k_pe` and the cache write of one MLA layer of the running vLLM engine.

    The arguments are those of `kernel.py`; the layer's cache and slot mapping come from vLLM's forward context. A layer
    whose cache our kernel may not write is rotated here and written by vLLM's own function. Without a slot mapping
    (profiling run) or cache nothing is written.

    Args:
        layer_name: vLLM's name of the layer, as the release at hand passes it to its own ops (a string or `LayerName`).

    Returns:
        `k_pe_out` `[num_tokens, 1, rot_dim]`, fresh and contiguous, every row defined. `q_pe` is rotated in place;
        `k_pe` is not mutated: vLLM's attention op reads it across a graph partition, and a mutated strided view would
        have to be copied there.

    Raises:
        RuntimeError: an argument does not fit (see `kernel.py`), or there is no forward context.
    """
    k_pe_out = _new_key(q_pe, k_pe)
    target = _write_target(q_pe, kv_c, kv_cache_dtype, layer_name)
    packed_q_pe = _packed(q_pe)
    inputs = (positions, packed_q_pe, _packed(k_pe), _packed(kv_c), cos_sin_cache, is_neox)
    kernel.op()(*inputs, target.slots, target.kv_cache, target.kv_cache_dtype, kv_cache_scale, k_pe_out)
    if packed_q_pe is not q_pe:
        q_pe.copy_(packed_q_pe)
    if target.by_stock:
        layers.stock_cache_update(kv_c, k_pe_out, layer_name, kv_cache_dtype, kv_cache_scale)
    return k_pe_out


def fused_norm_concat_and_cache_mla_rope(
    positions: torch.Tensor,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    kv_c: torch.Tensor,
    kv_c_weight: torch.Tensor,
    epsilon: float,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache_dtype: str,
    kv_cache_scale: torch.Tensor,
    layer_name: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_concat_and_cache_mla_rope` with the RMSNorm of the latent before it.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]`, the raw latent, usually a strided view of the qkv_a output. Not mutated.
        kv_c_weight: `[kv_lora_rank]`, the norm's weight, in the activation dtype.
        epsilon: added to the mean of squares.

    Returns:
        `(k_pe_out, kv_c_normed)`; `kv_c_normed` `[num_tokens, kv_lora_rank]` is fresh, contiguous and wholly defined.
    """
    k_pe_out = _new_key(q_pe, k_pe)
    kv_c_normed = torch.empty(kv_c.shape, dtype=kv_c.dtype, device=kv_c.device)
    target = _write_target(q_pe, kv_c, kv_cache_dtype, layer_name, with_norm=True)
    packed_q_pe = _packed(q_pe)
    inputs = (positions, packed_q_pe, _packed(k_pe), _packed(kv_c), kv_c_weight, epsilon, cos_sin_cache, is_neox)
    outputs = (k_pe_out, kv_c_normed)
    kernel.norm_op()(*inputs, target.slots, target.kv_cache, target.kv_cache_dtype, kv_cache_scale, *outputs)
    if packed_q_pe is not q_pe:
        q_pe.copy_(packed_q_pe)
    if target.by_stock:
        layers.stock_cache_update(kv_c_normed, k_pe_out, layer_name, kv_cache_dtype, kv_cache_scale)
    return k_pe_out, kv_c_normed


@dataclass(frozen=True)
class _Target:
    """Where the kernel writes: nowhere (no slots) if vLLM's own function does it, or nobody."""

    slots: torch.Tensor
    kv_cache: torch.Tensor
    kv_cache_dtype: str
    by_stock: bool


def _write_target(
    q_pe: torch.Tensor, kv_c: torch.Tensor, kv_cache_dtype: str, layer_name: Any, with_norm: bool = False
) -> _Target:
    layer, kv_cache, slot_mapping = layers.layer_context(layer_name)
    if slot_mapping is None or kv_cache.numel() == 0:
        reason = None
    else:
        reason = cache_writer.why_not_replaced(layer, kv_cache, kv_cache_dtype, kv_c)
        if reason is None:
            report.saw_layer(layer, None, with_norm)
            return _Target(slot_mapping, kv_cache, cache_writer.kernel_cache_dtype(kv_cache_dtype), by_stock=False)
    report.saw_layer(layer, reason, with_norm)
    no_slots = torch.empty(0, dtype=torch.int64, device=q_pe.device)
    return _Target(no_slots, kv_c.new_empty(0), "auto", by_stock=reason is not None)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension: what Inductor computes itself may reach an op in another layout than traced."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _new_key(q_pe: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    num_tokens, _, rot_dim = q_pe.shape
    return torch.empty((num_tokens, 1, rot_dim), dtype=k_pe.dtype, device=k_pe.device)


def _fake(
    positions: torch.Tensor,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    kv_c: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache_dtype: str,
    kv_cache_scale: torch.Tensor,
    layer_name: Any,
) -> torch.Tensor:
    k_pe_out = k_pe.new_empty((q_pe.shape[0], 1, q_pe.shape[-1]))
    kernel.check_shapes(q_pe, k_pe_out)
    return k_pe_out


def _norm_fake(
    positions: torch.Tensor,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    kv_c: torch.Tensor,
    kv_c_weight: torch.Tensor,
    epsilon: float,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache_dtype: str,
    kv_cache_scale: torch.Tensor,
    layer_name: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    k_pe_out = k_pe.new_empty((q_pe.shape[0], 1, q_pe.shape[-1]))
    kernel.check_shapes(q_pe, k_pe_out)
    return k_pe_out, kv_c.new_empty(kv_c.shape)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library(kernel.NAMESPACE, "FRAGMENT")


@functools.cache
def register() -> LayerOps:
    """Registers both ops with the layer-name type of the vLLM at hand."""
    layer_name = f"{layers.layer_name_schema_type()} layer_name"
    rest = f"Tensor cos_sin_cache, bool is_neox, str kv_cache_dtype, Tensor kv_cache_scale, {layer_name}"
    tensors = "Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c"
    norm = "Tensor kv_c_weight, float epsilon"
    _define(_NAME, f"({tensors}, {rest}) -> Tensor", fused_concat_and_cache_mla_rope, _fake)
    _define(
        _NORM_NAME, f"({tensors}, {norm}, {rest}) -> (Tensor, Tensor)", fused_norm_concat_and_cache_mla_rope, _norm_fake
    )
    namespace = torch.ops.mla_fusion
    return LayerOps(getattr(namespace, _NAME).default, getattr(namespace, _NORM_NAME).default)


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # Any layout of the inputs will do; a copy to a wanted one would take the in-place query away.
    _library().define(name + schema, tags=(torch.Tag.flexible_layout,))
    for dispatch_key in ("CPU", "CUDA"):
        _library().impl(name, function, dispatch_key)
    _library()._register_fake(name, fake)
