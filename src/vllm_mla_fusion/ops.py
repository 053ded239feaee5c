# SPDX-License-Identifier: Apache-2.0
"""`mla_fusion::fused_concat_and_cache_mla_rope`: the op that the pass puts into vLLM's graphs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_mla_fusion import compat, kernel, report

_NAME = "fused_concat_and_cache_mla_rope"


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
    name, layer, kv_cache, slot_mapping = compat.layer_context(layer_name)
    num_tokens, _, rot_dim = q_pe.shape
    k_pe_out = torch.empty((num_tokens, 1, rot_dim), dtype=k_pe.dtype, device=k_pe.device)
    reason = None
    if slot_mapping is None or kv_cache.numel() == 0:
        slots = None
    else:
        reason = compat.why_not_replaced(layer, kv_cache, kv_cache_dtype, kv_c)
        slots = slot_mapping if reason is None else None
    report.saw_layer(name, reason)
    if slots is None:
        slots = torch.empty(0, dtype=torch.int64, device=q_pe.device)
        rotate_dtype = "auto"
        kv_cache = kv_c.new_empty((0, 1, kv_c.shape[1] + rot_dim))
    else:
        rotate_dtype = compat.kernel_cache_dtype(kv_cache_dtype)
    kernel.op()(
        positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slots, kv_cache, rotate_dtype, kv_cache_scale, k_pe_out
    )
    if reason is not None:
        compat.stock_cache_update(kv_c, k_pe_out, layer_name, kv_cache_dtype, kv_cache_scale)
    return k_pe_out


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
    torch._check(q_pe.dim() == 3, lambda: f"q_pe must be [num_tokens, num_heads, rot_dim], got {tuple(q_pe.shape)}")
    return k_pe.new_empty((q_pe.shape[0], 1, q_pe.shape[2]))


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library(kernel.NAMESPACE, "FRAGMENT")


@functools.cache
def register() -> Any:
    """Registers the op with the layer-name type of the vLLM at hand; returns it as an OpOverload."""
    library = _library()
    library.define(
        f"{_NAME}(Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c, Tensor cos_sin_cache, bool is_neox, "
        f"str kv_cache_dtype, Tensor kv_cache_scale, {compat.layer_name_schema_type()} layer_name) -> Tensor",
        # Any layout of the inputs will do; a copy to a wanted one would take the in-place query away.
        tags=(torch.Tag.flexible_layout,),
    )
    for dispatch_key in ("CPU", "CUDA"):
        library.impl(_NAME, fused_concat_and_cache_mla_rope, dispatch_key)
    library._register_fake(_NAME, _fake)
    return getattr(torch.ops.mla_fusion, _NAME).default
