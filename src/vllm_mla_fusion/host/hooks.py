# SPDX-License-Identifier: Apache-2.0
"""What is patched in the vLLM of this process."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from vllm_mla_fusion import activation, identity
from vllm_mla_fusion.host import cache_writer, config, layer_state, layers, passes, support
from vllm_mla_fusion.host.support import PATCHED, UPDATE_OP

_ENVIRONMENT_FACTOR = "VLLM_MLA_FUSION"

PrepareConfig = Callable[[Any, bool], None]
BeforeDevice = Callable[[Any], None]
AfterWarmUp = Callable[[Any, Any, int], None]


def install_hooks(prepare_config: PrepareConfig, before_device: BeforeDevice, after_warm_up: AfterWarmUp) -> None:
    """Patches the vLLM of this process; a second call does nothing.

    Args:
        prepare_config: called with each finished VllmConfig and whether its splitting ops were vLLM's default.
        before_device: called in each worker with its VllmConfig, before it has a device or a model.
        after_warm_up: called after compilation and warm-up of each worker with its VllmConfig, the worker, and its rank
            among the engine's workers.
    """
    environment = importlib.import_module("vllm.envs").environment_variables
    # vLLM's compile caches are keyed by all of these; the passes are not part of the key.
    environment[_ENVIRONMENT_FACTOR] = identity.compile_cache_key
    _hook_pass_manager()
    _hook_worker(before_device, after_warm_up)
    # Last: it changes the graphs, which nothing may do if one of the others fails.
    _hook_config(prepare_config)


def _hook_config(prepare_config: PrepareConfig) -> None:
    config_class = importlib.import_module("vllm.config").VllmConfig
    original = config_class.__post_init__
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        is_default = getattr(getattr(self, "compilation_config", None), "splitting_ops", ()) is None
        original(self, *args, **kwargs)
        prepare_config(self, is_default)

    setattr(post_init, PATCHED, True)
    config_class.__post_init__ = post_init


def _hook_worker(before_device: BeforeDevice, after_warm_up: AfterWarmUp) -> None:
    wrapper_class = importlib.import_module("vllm.v1.worker.worker_base").WorkerWrapperBase
    if hasattr(wrapper_class.init_device, PATCHED):
        return
    stock_init_device = wrapper_class.init_device
    stock_warm_up = getattr(wrapper_class, "compile_or_warm_up_model", None)

    @functools.wraps(stock_init_device)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        with activation.warn_unless_strict("this worker's configuration could not be read"):
            before_device(self.vllm_config)
        return stock_init_device(self, *args, **kwargs)

    # Executors call this method through the wrapper, whose __getattr__ would hand it to the worker.
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache_writer.try_stock_writers(self)
        call = functools.partial(stock_warm_up, self) if stock_warm_up else self.worker.compile_or_warm_up_model
        with layer_state.watching(_layers_of(self)):
            result = call(*args, **kwargs)
        with activation.warn_unless_strict("the number of fused layers could not be told"):
            # Executors of one worker each (external launcher) number all of them 0; the worker knows its rank.
            after_warm_up(self.vllm_config, self.worker, getattr(self.worker, "rank", self.rpc_rank))
        return result

    setattr(init_device, PATCHED, True)
    wrapper_class.init_device = init_device
    wrapper_class.compile_or_warm_up_model = compile_or_warm_up_model


def _layers_of(wrapper: Any) -> list[Any]:
    try:
        return list(layers.mla_layers(wrapper.vllm_config).values())
    except Exception:
        # Told after the warm-up, where the same is asked.
        return []


def _hook_pass_manager() -> None:
    platform_class = type(support.platform())
    if hasattr(platform_class.get_pass_manager_cls, PATCHED):
        return
    passes.remember_stock_pass_manager(platform_class.get_pass_manager_cls())

    def get_pass_manager_cls(cls: type) -> str:
        return f"{passes.__name__}.FusionPassManager"

    setattr(get_pass_manager_cls, PATCHED, True)
    platform_class.get_pass_manager_cls = classmethod(get_pass_manager_cls)


def keep_update_in_graph(vllm_config: Any, splitting_ops_are_default: bool) -> str | None:
    """Lets the fusion see the cache update: returns None, or why it must stay outside the compiled graphs.

    Where vLLM compiles with plain Inductor (on the CPU), the pass goes into Inductor's own hook.
    """
    compilation = vllm_config.compilation_config
    if config.mode(compilation) != "VLLM_COMPILE":
        passes.hook_inductor(compilation)
        return None
    if splitting_ops_are_default and UPDATE_OP in (compilation.splitting_ops or []):
        compilation.splitting_ops.remove(UPDATE_OP)
    return config.update_problem(vllm_config)
