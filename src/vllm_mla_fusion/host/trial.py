# SPDX-License-Identifier: Apache-2.0
"""Starts this vLLM's own engine with a model and ends the start where the pass has seen every graph.

`python -m vllm_mla_fusion.host.trial FOLDER RESULT ARGUMENTS` for `tools.trial`: in a process of its own, since vLLM,
its devices and its groups of processes stay as they are then. The kernel is taken for built; none is.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from vllm_mla_fusion import kernel
from vllm_mla_fusion.fx import fusion
from vllm_mla_fusion.host import cache_writer, config, layers, passes, support

# Enough for a profile run; a share of the memory that is free beside a running server.
ARGUMENTS = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.05,
}
ADAPTORS = ("InductorAdaptor", "InductorStandaloneAdaptor")


@dataclass
class Outcome:
    """What the pass did: of `layers` MLA layers, how many it fused and with the latent's norm, and why not others;
    `ended`: why the start ended before the graphs were known."""

    layers: int = 0
    fused: int = 0
    with_norm: int = 0
    where: str = ""
    reasons: list[str] = field(default_factory=list)
    ended: str = ""


class _Traced(Exception):
    """Ends a compilation behind the pass."""


@dataclass
class _Seen:
    """All that went through the pass, and whether no graph is left. One may come again, for other ranges of sizes."""

    updates: int = 0
    fused: int = 0
    with_norm: int = 0
    reasons: dict[str, None] = field(default_factory=dict)
    complete: bool = False


def trial(folder: Path, engine_arguments: dict[str, Any]) -> Outcome:
    """What the pass makes of the model in `folder`, with random weights and these arguments of vLLM's engine."""
    outcome = Outcome(where=f"vLLM {support.installed_vllm_version()}")
    with patch.object(kernel, "failure", lambda: None):
        # It loads the plugin, as in a server.
        given = {**engine_arguments, **ARGUMENTS, "model": str(folder)}
        vllm_config = importlib.import_module("vllm.engine.arg_utils").EngineArgs(**given).create_engine_config()
        outcome.where += f" on {support.platform().device_type}"
        if not hasattr(type(vllm_config).__post_init__, support.PATCHED):
            outcome.ended = "vLLM has not loaded the plugin, or it is not active with this vLLM"
        elif reason := _config_problem(vllm_config):
            # Nothing would end the start of such an engine.
            outcome.layers = vllm_config.model_config.hf_text_config.num_hidden_layers
            outcome.reasons = [reason]
        else:
            _start(vllm_config, outcome)
    return outcome


def _config_problem(vllm_config: Any) -> str | None:
    """Why no graph of this configuration can be fused."""
    problems = (config.not_compiled_reason, config.config_problem, config.update_problem)
    return next((reason for problem in problems if (reason := problem(vllm_config))), None)


def _start(vllm_config: Any, outcome: Outcome) -> None:
    seen = _Seen()
    # Plain Inductor, as on the CPU, compiles one graph; vLLM's own backend cuts a model into several.
    is_cut = config.mode(vllm_config.compilation_config) == "VLLM_COMPILE"
    try:
        with _recording(seen, is_cut):
            importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine.from_vllm_config(vllm_config)
    except Exception as error:
        if not seen.complete:
            outcome.ended = f"{type(error).__name__}: {error}"
            return
    built = layers.mla_layers(vllm_config)
    outcome.layers = len(built)
    if built:
        _judge(outcome, seen, vllm_config.model_config.dtype, built)


def _judge(outcome: Outcome, seen: _Seen, dtype: torch.dtype, built: dict[str, Any]) -> None:
    problems = dict.fromkeys(filter(None, (_cache_problem(layer, dtype) for layer in built.values())))
    rounds = max(1, seen.updates // len(built))
    outcome.fused = 0 if problems else min(len(built), seen.fused // rounds)
    outcome.with_norm = min(outcome.fused, seen.with_norm // rounds)
    outcome.reasons = list(problems | seen.reasons)
    if seen.updates < len(built) and not outcome.reasons:
        outcome.reasons = ["vLLM does not put its cache update into a graph"]


def _cache_problem(layer: Any, dtype: torch.dtype) -> str | None:
    """Why the op would leave a layer's cache to vLLM's writer, as far as that shows without a cache."""
    kind = layer.kv_cache_dtype
    if kind == "fp8_ds_mla":
        # Decided by a trial of the writers when the cache is there.
        return None
    width = layer.kv_lora_rank + layer.qk_rope_head_dim
    cache_dtype = dtype if kind == "auto" else {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind)
    cache = torch.empty(1, 1, width, dtype=cache_dtype or torch.uint8, device=support.platform().device_type)
    return cache_writer.why_not_replaced(layer, cache, kind, dtype)


@contextmanager
def _recording(seen: _Seen, is_cut: bool) -> Iterator[None]:
    """Notes what the pass does, and ends the compilation of each graph after its last step."""
    stock_fuse, stock_last_step = fusion.fuse, passes.defunctionalise

    def fuse(graph: fx.Graph, ops: Any) -> fusion.FusionResult:
        seen.updates += len(graph.find_nodes(op="call_function", target=ops.update))
        try:
            result = stock_fuse(graph, ops)
        except Exception as error:
            seen.reasons[f"the pass failed: {error!r}"] = None
            raise
        seen.fused += result.fused
        seen.with_norm += result.with_norm
        no_rope = ["no rotary embedding leads to the key that is cached"] if result.without_rope else []
        seen.reasons.update(dict.fromkeys([*result.reasons, *no_rope]))
        return result

    def last_step(graph: fx.Graph) -> None:
        stock_last_step(graph)
        seen.complete = not is_cut
        raise _Traced

    with ExitStack() as stack:
        stack.enter_context(patch.object(fusion, "fuse", fuse))
        stack.enter_context(patch.object(passes, "defunctionalise", last_step))
        if is_cut:
            _go_on_to_the_last_graph(stack, seen)
        yield


def _go_on_to_the_last_graph(stack: ExitStack, seen: _Seen) -> None:
    """vLLM's backend compiles one graph after the other; then it is left."""
    interface = importlib.import_module("vllm.compilation.compiler_interface")
    backend = importlib.import_module("vllm.compilation.backends").VllmBackend
    stock_call = backend.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_call(self, *args, **kwargs)
        seen.complete = True
        raise _Traced

    stack.enter_context(patch.object(backend, "__call__", call))
    for adaptor in (getattr(interface, name) for name in ADAPTORS):
        stack.enter_context(patch.object(adaptor, "compile", _until_traced(adaptor.compile)))


def _until_traced(stock_compile: Callable[..., Any]) -> Callable[..., Any]:
    def compile_until_traced(*args: Any, **kwargs: Any) -> tuple[Callable[..., None], None]:
        try:
            stock_compile(*args, **kwargs)
        except Exception as error:
            if not _is_traced(error):
                raise
        return (lambda *_: None), None

    return compile_until_traced


def _is_traced(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _Traced):
        error = error.__cause__ or error.__context__
    return error is not None


def main(arguments: list[str]) -> None:
    folder, result = map(Path, arguments[:2])
    try:
        outcome = trial(folder, json.loads(arguments[2]))
    except Exception as error:
        outcome = Outcome(ended=f"{type(error).__name__}: {error}")
        raise
    finally:
        result.write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1:])
