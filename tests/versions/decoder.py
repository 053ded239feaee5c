# SPDX-License-Identifier: Apache-2.0
"""Whole models of the installed vLLM, few layers each, with fake weights on a GPU as the release's own code loads them."""

import functools
import gc
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm import platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from . import weights, world
from .configurations import Case
from .models import GEOMETRY, MAX_MODEL_LEN
from .tracing import NUM_TOKENS


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
        _forget()
        yield


def _forget() -> None:
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and str(each.__module__).startswith("vllm."):
            each.cache_clear()
    rotary_embedding._ROPE_DICT.clear()


def vllm_config(case: Case, folder: Path) -> VllmConfig:
    """The config of an engine that serves the case's model; `folder` receives the model's config.json."""
    config = GEOMETRY | case.model.config | {"architectures": [case.model.architecture]}
    config["torch_dtype"] = case.checkpoint.dtype
    if case.checkpoint.quantization is not None:
        config["quantization_config"] = case.checkpoint.quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    nothing_to_time = {"inductor_compile_config": {"benchmark_combo_kernel": False}}
    arguments = {"max_model_len": MAX_MODEL_LEN} | case.configuration.arguments
    compilation = nothing_to_time | case.configuration.compilation
    engine = EngineArgs(model=str(folder), skip_tokenizer_init=True, compilation_config=compilation, **arguments)
    return engine.create_engine_config()


def build(config: VllmConfig, mode: FakeTensorMode) -> torch.nn.Module:
    """The model as the engine's worker has it before its first forward."""
    device = torch.device("cuda")
    with (
        torch.compiler.set_stance("force_eager"),  # functions that prepare weights are compiled
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        mode,
        device,
        weights.fake_parameters(),
    ):
        model = initialize_model(config)
        weights.process(model)
    return model


def inputs(config: VllmConfig) -> dict[str, torch.Tensor]:
    """What the runner gives to the model."""
    return {
        "input_ids": torch.zeros(NUM_TOKENS, dtype=torch.int32),
        "positions": torch.zeros(NUM_TOKENS, dtype=torch.int64),
    }
