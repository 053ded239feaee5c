# SPDX-License-Identifier: Apache-2.0
"""Whether our kernel may write a layer's cache in the place of vLLM's own writer."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.activation import logger
from vllm_mla_fusion.host import layers, support

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
_DS_MLA = "fp8_ds_mla"
_DS_MLA_ROW_BYTES = 656


def stock_kernels() -> Any:
    """The module of vLLM's own GPU kernels.

    Raises:
        ImportError: there is no vLLM.
    """
    return importlib.import_module("vllm._custom_ops")


@functools.cache
def _default_writers() -> tuple[Any, ...]:
    """The `do_kv_cache_update` functions whose rows our kernel writes as well."""
    candidates = [
        ("vllm.v1.attention.backend", "MLAAttentionImpl"),
        ("vllm.v1.attention.backend", "SparseMLAAttentionImpl"),
    ]
    if support.platform().is_cpu():
        candidates += [
            ("vllm.v1.attention.backends.mla.cpu_mla", "CPUMLAImpl"),
            ("vllm.v1.attention.backends.mla.amx_mla", "AMXMLAImpl"),
        ]
    writers = []
    for module, name in candidates:
        try:
            writer = getattr(importlib.import_module(module), name).do_kv_cache_update
        except (ImportError, AttributeError):
            continue
        writers.append(writer)
    return tuple(writers)


def kernel_cache_dtype(kv_cache_dtype: str) -> str:
    """The kernel's name of a cache dtype of vLLM: its fp8 is OCP's, or fnuz where `current_platform.fp8_dtype()` is."""
    if kv_cache_dtype not in _FP8 or support.platform().fp8_dtype() != torch.float8_e4m3fnuz:
        return kv_cache_dtype
    return "fp8_e5m2fnuz" if kv_cache_dtype == "fp8_e5m2" else "fp8_e4m3fnuz"


def why_not_replaced(layer: Any, kv_cache: torch.Tensor, kv_cache_dtype: str, dtype: torch.dtype) -> str | None:
    """Why our kernel may not write this layer's cache in the place of vLLM's writer; None if it may.

    Args:
        dtype: the latent's.
    """
    return _layer_problem(layer) or _cache_problem(kv_cache, kv_cache_dtype, layer, dtype)


def _layer_problem(layer: Any) -> str | None:
    if getattr(type(layer.impl), "do_kv_cache_update", None) not in _default_writers():
        return f"{type(layer.impl).__name__} has its own cache writer"
    base = getattr(layers.runtime()[2].MLAAttention, "update_kv_cache", None)
    if getattr(type(layer), "update_kv_cache", None) is not base:
        return f"{type(layer).__name__} overrides update_kv_cache"
    if getattr(layer, "use_pcp", False):
        return "prefill context parallelism gathers the latents before they are cached"
    if getattr(layer, "hisparse_cache", None) is not None:
        return "HiSparse redirects the cache write"
    return None


def _cache_problem(kv_cache: torch.Tensor, kv_cache_dtype: str, layer: Any, dtype: torch.dtype) -> str | None:
    width = _DS_MLA_ROW_BYTES if kv_cache_dtype == _DS_MLA else layer.kv_lora_rank + layer.qk_rope_head_dim
    if kv_cache.dim() != 3 or kv_cache.shape[-1] != width or kv_cache.stride(-1) != 1:
        return f"cache layout {tuple(kv_cache.shape)} is not [num_blocks, block_size, {width}]"
    if kv_cache_dtype in ("auto", "bfloat16", "float16"):
        return None if kv_cache.dtype == dtype else f"the cache is {kv_cache.dtype}, the latent {dtype}"
    if kv_cache_dtype == "fp8_e5m2" and support.platform().is_rocm():
        return "vLLM's writer knows no fp8_e5m2 on ROCm, and its attention would read it as e4m3"
    if kv_cache_dtype in _FP8 and dtype == torch.float16 and support.platform().is_rocm():
        return "vLLM's writer on ROCm rounds a float16 quotient to float16 before it rounds to fp8"
    if kv_cache_dtype in (*_FP8, _DS_MLA) and kv_cache.is_cuda and kv_cache.dtype != torch.uint8:
        return f"the {kv_cache_dtype} cache is {kv_cache.dtype}, not torch.uint8"
    if kv_cache_dtype in _FP8 and kv_cache.is_cuda:
        return None
    if kv_cache_dtype == _DS_MLA and support.platform().is_cuda():
        return _ds_mla_problem(kv_cache.device, dtype)
    return f"cache dtype {kv_cache_dtype!r} on {kv_cache.device.type}"


def _ds_mla_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return f"fp8_ds_mla rows hold a key of 16 bits, the latent is {dtype}"
    if _ds_mla_writer_agrees.cache_info().currsize == 0 and torch.cuda.is_current_stream_capturing():
        return "vLLM's fp8_ds_mla writer was not tried before a CUDA graph was captured"
    return None if _ds_mla_writer_agrees(device) else "vLLM's fp8_ds_mla writer stores other bytes than our kernel"


@functools.cache
def _ds_mla_writer_agrees(device: torch.device) -> bool:
    """Whether vLLM's writer and our kernel leave the same bytes: releases differ in the scales of fp8_ds_mla."""

    num_tokens = 64
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_tokens, 576, generator=generator) * torch.logspace(-6, 6, num_tokens, 10.0).unsqueeze(1)
    kv_c, k_pe = values.to(torch.bfloat16).to(device).split([512, 64], -1)
    slots = torch.arange(num_tokens, device=device)
    scale = torch.ones(1, device=device)
    ours, theirs = torch.zeros((2, 1, num_tokens, _DS_MLA_ROW_BYTES), dtype=torch.uint8, device=device)
    unrotated = torch.tensor([1.0] * 32 + [0.0] * 32, device=device).unsqueeze(0)
    q_pe, k_pe_out = torch.zeros((2, num_tokens, 1, 64), dtype=torch.bfloat16, device=device)
    try:
        stock_kernels().concat_and_cache_mla(kv_c, k_pe, theirs, slots, _DS_MLA, scale)
        inputs = (torch.zeros_like(slots), q_pe, k_pe, kv_c, unrotated, False)
        kernel.op()(*inputs, slots, ours, _DS_MLA, scale, k_pe_out)
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(ours, theirs)


def try_stock_writers(wrapper: Any) -> None:
    """Finds out before CUDA graphs are captured what the op will ask; else it leaves the cache to vLLM's writer."""
    try:
        dtypes = {layer.kv_cache_dtype for layer in layers.mla_layers(wrapper.vllm_config).values()}
        if _DS_MLA in dtypes and support.platform().is_cuda():
            _ds_mla_writer_agrees(torch.device("cuda", torch.cuda.current_device()))
    except Exception:
        logger.warning("MLA fusion: vLLM's cache writer could not be tried.", exc_info=True)
