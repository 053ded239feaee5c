# SPDX-License-Identifier: Apache-2.0
"""What must hold for the plugin's hooks into a release, beside the graphs: the pass manager, the worker, the layers."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_mla_fusion import identity, plugin
from vllm_mla_fusion.arguments import PLAIN
from vllm_mla_fusion.host import cache_writer, layer_state, layers, passes, report, support

from . import slots
from .stock_model import NUM_LAYERS

BLOCKS, BLOCK_SIZE = 4, 64


def problems() -> Iterator[str]:
    """Loads the plugin, first switched off and then in earnest; yields what is wrong with its hooks."""
    stock = _hooked_functions()
    with patch.dict(os.environ, MLA_FUSION="0"):
        plugin.register()
    if _hooked_functions() != stock:
        yield "the plugin hooks vLLM although it is switched off"
    load_general_plugins()
    hooked = _hooked_functions()
    plugin.register()
    if _hooked_functions() != hooked:
        yield "registering again hooks again"
    if probe := support.failed_probe():
        yield f"probe {probe} fails"
    yield from slots.problems()
    if resolve_obj_by_qualname(current_platform.get_pass_manager_cls()) is not passes.FusionPassManager:
        yield f"the platform's pass manager is {current_platform.get_pass_manager_cls()}"
    if "VLLM_MLA_FUSION" not in envs.compile_factors():
        yield "the plugin is not part of the compile cache's key"


def _hooked_functions() -> tuple[Any, ...]:
    return (
        VllmConfig.__post_init__,
        WorkerWrapperBase.init_device,
        getattr(WorkerWrapperBase, "compile_or_warm_up_model", None),
        type(current_platform).get_pass_manager_cls.__func__,
        "VLLM_MLA_FUSION" in envs.environment_variables,
    )


def config_problems(config: VllmConfig) -> Iterator[str]:
    """Whether the cache update may enter the graphs, also in the copy that composite models make of their config."""
    for each in (config, config.with_hf_config(config.model_config.hf_config)):
        if support.UPDATE_OP in each.compilation_config.splitting_ops:
            yield f"{support.UPDATE_OP} is still a splitting op"


def layer_problems(config: VllmConfig, cache_dtype: str) -> Iterator[str]:
    """What keeps the op at run time from writing the caches of the layers that were built with `config`."""
    built = layers.mla_layers(config)
    if len(built) != NUM_LAYERS:
        yield f"{len(built)} MLA layers found, expected {NUM_LAYERS}"
    latent = torch.empty(1, config.model_config.hf_config.kv_lora_rank, dtype=torch.bfloat16, device="cuda")
    slots = torch.zeros(1, dtype=torch.int64, device="cuda")
    for name, layer in built.items():
        dtype = torch.bfloat16 if cache_dtype == "auto" else torch.uint8
        layer.kv_cache = torch.zeros(BLOCKS, BLOCK_SIZE, layer.head_size, dtype=dtype, device="cuda")
        with set_forward_context(None, config, slot_mapping={name: slots}):
            found = layers.layer_context(_encode_layer_name(name))
        if not all(map(_is, found, (layer, layer.kv_cache, slots))):
            yield f"{name} is not found in the forward context"
        if reason := cache_writer.why_not_replaced(layer, layer.kv_cache, cache_dtype, latent.dtype):
            yield f"{name} would not be written: {reason}"


def worker_problems(config: VllmConfig, model: torch.nn.Module) -> Iterator[str]:
    """Whether a worker that is spawned with `config` expects the kernel, and strict mode judges it after its warm-up.

    All calls go through the worker's wrapper, as executors make them.
    """
    wrapper = WorkerWrapperBase(rpc_rank=0)
    wrapper.vllm_config = config
    stubs = {"init_device": list, "compile_or_warm_up_model": lambda: "times", "get_model": lambda: model}
    wrapper.worker = SimpleNamespace(**stubs)
    with patch.object(identity, "_kernel_expected", threading.Event()) as expected:
        wrapper.init_device()
        if not expected.is_set():
            yield "a spawned worker does not know that it needs the kernel"
    with suppress(report.NotFusedError):
        wrapper.compile_or_warm_up_model()
        yield "strict mode accepts layers that never ran the op"
    yield from _own_code_problems(config, wrapper.worker, model)
    for layer in layers.mla_layers(config).values():
        layer_state.of(layer).saw(PLAIN, None)
    if wrapper.compile_or_warm_up_model() != "times":
        yield "the warm-up's result is lost"


def _own_code_problems(config: VllmConfig, worker: Any, model: torch.nn.Module) -> Iterator[str]:
    """The release's wrapper is told from one without RoPE, as Kimi-Linear has."""
    if found := layers.layers_with_own_code(config, worker):
        yield f"stock layers are taken for a model's own: {found}"
    wrappers = [module for module in model.modules() if hasattr(module, "rotary_emb")]
    with ExitStack() as without_rope:
        for wrapper in wrappers:
            without_rope.enter_context(patch.object(wrapper, "rotary_emb", None))
        found = layers.layers_with_own_code(config, worker)
    if [each.reason for each in found.values()] != ["it has no rotary embedding"] * NUM_LAYERS:
        yield f"layers without RoPE are not recognised: {found}"


def _is(first: Any, second: Any) -> bool:
    return first is second
