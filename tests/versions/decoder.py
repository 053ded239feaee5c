# SPDX-License-Identifier: Apache-2.0
"""Whole models of the installed vLLM, of few layers, with fake weights as the release's own code prepares them."""

import functools
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import platforms
from vllm.compilation import backends
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.model_manager import create_lora_manager
from vllm.model_executor.layers import quantization, rotary_embedding
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader import utils
from vllm.model_executor.models import registry
from vllm.transformers_utils import config as vllm_configs
from vllm.utils.torch_utils import set_default_torch_dtype

from . import codegen, weights
from .configurations import Case
from .models import GEOMETRY, MAX_MODEL_LEN, TARGETS
from .tracing import NUM_TOKENS

CONFIG_CLASS = """from transformers import PretrainedConfig


class Configuration(PretrainedConfig):
    model_type = "{model_type}"
"""


# A library of quantised GEMMs, which two releases import whatever the checkpoint's form, and do not bring along.
HUMMING = ("humming", *(f"humming.{part}" for part in ("config", "dtypes", "layer", "schema", "utils", "utils.weight")))


def _stand_in_for_humming() -> None:
    source = Path(quantization.__file__).parent / "humming.py"
    if source.exists() and " from humming.layer import" in source.read_text():
        sys.modules.update({name: MagicMock() for name in HUMMING})


_stand_in_for_humming()


class _NoStream:
    """Of a device that is not there."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


@contextmanager
def pretended(case: Case) -> Iterator[None]:
    """The GPU and the variables of a case. vLLM caches what it asked the platform."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, case.configuration.environ))
        stack.enter_context(patch.object(type(platforms.current_platform), "capability", case.checkpoint.capability))
        stack.enter_context(patch.multiple(torch.cuda, Stream=_NoStream, Event=_NoStream))
        # vLLM looks at each model class in a process of its own, which would have to import it all again.
        stack.enter_context(patch.object(registry, "_run_in_subprocess", lambda look: look()))
        lazy = registry._LazyRegisteredModel
        stack.enter_context(patch.object(lazy, "load_model_cls", _as_on_gpu(lazy.load_model_cls)))
        if hasattr(MoERunner, "_maybe_add_zero_expert_output"):
            # Stock vLLM cannot trace it: it asserts that the router has run. LongCat-Flash only.
            stack.enter_context(patch.object(MoERunner, "_maybe_add_zero_expert_output", lambda _, result: result))
        _forget()
        yield


def _as_on_gpu(stock_load: Callable[[Any], type]) -> Callable[[Any], type]:
    """What linear attention's module imports asks which GPU there is; without one, Dynamo does not know its kernels."""

    def load_model_cls(registered: Any) -> type:
        with codegen.pretended_gpu():
            model_cls = stock_load(registered)
        module = sys.modules[model_cls.__module__]
        if hasattr(module, "fused_kda_gate"):  # Bailing V3
            module.fused_kda_gate = _kda_gate
        return model_cls

    return load_model_cls


def _kda_gate(g: torch.Tensor, A: torch.Tensor, head_k_dim: int, *, g_bias: torch.Tensor, **_: Any) -> torch.Tensor:
    """Of the shape that the Triton kernel gives, of all that it reads."""
    return (g + g_bias).float().unflatten(-1, (-1, head_k_dim)) * A.view(-1, 1)


def _forget() -> None:
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and str(each.__module__).startswith("vllm."):
            each.cache_clear()
    rotary_embedding._ROPE_DICT.clear()


def vllm_config(case: Case, folder: Path) -> VllmConfig:
    """The config of an engine that serves the case's model; `folder` receives the model's config.json."""
    model = case.model
    config = GEOMETRY | model.config | {"architectures": [TARGETS.get(model.architecture, model.architecture)]}
    longcat = getattr(transformers, "LongcatFlashConfig", None)
    if "num_layers" in config and isinstance(getattr(longcat, "num_hidden_layers", None), property):
        # Newer transformers count LongCat-Flash's attentions by it, two in each layer.
        config["num_hidden_layers"] *= 2
    config["torch_dtype"] = case.checkpoint.dtype
    if case.checkpoint.quantization is not None:
        config["quantization_config"] = case.checkpoint.quantization
    arguments = {"max_model_len": MAX_MODEL_LEN, "trust_remote_code": True} | case.configuration.arguments
    if model.draft:
        arguments["speculative_config"] = dict(model.draft)
        if model.draft_config:
            draft = config | model.draft_config | {"architectures": [model.architecture]}
            arguments["speculative_config"]["model"] = _write(folder / "draft", draft)
    nothing_to_time = {"inductor_compile_config": {"benchmark_combo_kernel": False}}
    arguments["compilation_config"] = nothing_to_time | case.configuration.compilation
    return EngineArgs(model=_write(folder, config), skip_tokenizer_init=True, **arguments).create_engine_config()


def _write(folder: Path, config: dict[str, Any]) -> str:
    """The folder of a checkpoint without weights, whose config class comes with it if no library has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config["model_type"] not in {*CONFIG_MAPPING, *vllm_configs._CONFIG_REGISTRY}:
        config["auto_map"] = {"AutoConfig": "configuration.Configuration"}
        (folder / "configuration.py").write_text(CONFIG_CLASS.format(**config))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@contextmanager
def as_in_worker(config: VllmConfig) -> Iterator[None]:
    """What a worker has set when it builds and compiles its model."""
    with ExitStack() as stack:
        stack.enter_context(config.kernel_config.ir_op_priority.set_priority())
        yield


def build(config: VllmConfig, case: Case, mode: FakeTensorMode) -> torch.nn.Module:
    """The model, or its draft, as the engine's worker has it before its first forward."""
    device = torch.device("cuda")
    with (
        torch.compiler.set_stance("force_eager"),  # functions that prepare weights are compiled
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        mode,
        device,
        weights.fake_parameters(),
        weights.KnownValues(),
        # It looks at every weight for the sake of reloading.
        patch.object(utils, "record_metadata_for_reloading", lambda _: None),
    ):
        model = _draft(config) if case.model.draft else utils.initialize_model(config)
        weights.process(model)
        if config.lora_config:
            scheduler = config.scheduler_config
            sizes = scheduler.max_num_seqs, scheduler.max_num_batched_tokens, config.model_config.get_vocab_size()
            model = create_lora_manager(model, *sizes, config.lora_config, config, device).model
    return model


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether any part of the model has vLLM's decorator, and it is not switched off."""
    return any(getattr(module, "do_not_compile", True) is False for module in model.modules())


def _draft(config: VllmConfig) -> torch.nn.Module:
    with backends.set_model_tag("eagle_head"):
        return utils.initialize_model(config, model_config=config.speculative_config.draft_model_config)


def inputs(config: VllmConfig, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the runner gives to the model; to a draft also what the target's last layer returned."""
    given = {
        "input_ids": torch.zeros(NUM_TOKENS, dtype=torch.int32),
        "positions": torch.zeros(NUM_TOKENS, dtype=torch.int64),
    }
    if "hidden_states" in inspect.signature(model.forward).parameters:
        given["hidden_states"] = torch.zeros(NUM_TOKENS, config.model_config.get_hidden_size(), dtype=torch.bfloat16)
    return given
