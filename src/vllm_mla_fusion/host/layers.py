# SPDX-License-Identifier: Apache-2.0
"""The MLA layers of a running engine: their names, context and stock functions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mla_fusion.host.support import ATTENTION, MLA_ATTENTION, MLA_WRAPPER


@functools.cache
def layer_name_schema_type() -> str:
    """How a custom op's schema names the type of vLLM's layer-name arguments."""
    torch_utils = importlib.import_module("vllm.utils.torch_utils")

    def example(layer_name) -> None:  # type: ignore[no-untyped-def]
        pass

    example.__annotations__["layer_name"] = torch_utils.LayerNameType
    schema = torch.library.infer_schema(example, mutates_args=())
    return schema.removeprefix("(").split(" layer_name")[0]


def layer_names_are_inputs() -> bool:
    """Whether vLLM hands layer names to its graphs (`LayerName`) instead of writing them into these (strings)."""
    return importlib.import_module("vllm.utils.torch_utils").LayerNameType is not str


@functools.cache
def runtime() -> tuple[Callable[[Any], str], Callable[[str], tuple[Any, Any, Any, Any]], Any]:
    """(resolve a layer name, get its attention context, the module of MLA attention) of the vLLM at hand."""
    resolve = importlib.import_module("vllm.utils.torch_utils")._resolve_layer_name
    context = importlib.import_module(ATTENTION).get_attention_context
    return resolve, context, importlib.import_module(MLA_ATTENTION)


def layer_context(layer_name: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """(layer, KV cache, slot mapping) of a layer in vLLM's current forward context."""
    resolve, get_attention_context, _ = runtime()
    return get_attention_context(resolve(layer_name))[1:]


def stock_cache_update(
    kv_c_normed: torch.Tensor, k_pe: torch.Tensor, layer_name: Any, kv_cache_dtype: str, k_scale: torch.Tensor
) -> None:
    """vLLM's own cache write of a rotated key: same arguments as `vllm.unified_mla_kv_cache_update`."""
    runtime()[2].unified_mla_kv_cache_update(kv_c_normed, k_pe, layer_name, kv_cache_dtype, k_scale)


def mla_layers(vllm_config: Any) -> dict[str, Any]:
    """All MLA attention layers that were built with this configuration, by name."""
    mla_class = importlib.import_module(MLA_ATTENTION).MLAAttention
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, mla_class)}


@dataclass(frozen=True)
class OwnCode:
    """Why a layer may never have what the pass looks for; `certain`: whatever its graph looks like."""

    reason: str
    certain: bool


def layers_with_own_code(vllm_config: Any, worker: Any) -> dict[str, OwnCode]:
    """The MLA layers of the worker's model (not of its draft model) that are not used as vLLM's own wrapper uses them
    with a rotary embedding, by name."""
    wrapper = importlib.import_module(MLA_WRAPPER).MultiHeadLatentAttentionWrapper
    parents = {child: module for module in worker.get_model().modules() for child in module.children()}
    found = {}
    for name, layer in mla_layers(vllm_config).items():
        parent = parents.get(layer)
        if type(layer).forward is not runtime()[2].MLAAttention.forward:
            found[name] = OwnCode(f"{type(layer).__name__} has its own forward", certain=True)
        elif isinstance(parent, wrapper) and parent.rotary_emb is None:
            found[name] = OwnCode("it has no rotary embedding", certain=True)
        elif parent is not None and not isinstance(parent, wrapper):
            reason = f"{type(parent).__name__} has a rotary embedding of its own or none"
            found[name] = OwnCode(reason, certain=False)
    return found
