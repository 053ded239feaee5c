# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own compilation of a model; records each graph before and after its pass manager, and Inductor's code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from vllm.compilation import backends, compiler_interface
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_mla_fusion.host import passes

from . import codegen

NUM_TOKENS = 10  # even, for sequence parallelism, and no other dimension of a model
RIVAL = "MLARoPEKVCacheCatFusionPass"


@dataclass
class Trace:
    """What one compilation gave to vLLM's pass manager, got from it and generated for it, graph by graph; `stock`: what
    it would have got without fusion, the plugin's and vLLM's."""

    before: list[torch.fx.Graph] = field(default_factory=list)
    stock: list[torch.fx.Graph] = field(default_factory=list)
    after: list[torch.fx.Graph] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = zip(self.before, self.after, self.code, strict=True)
        path.write_text("\n\n".join("BEFORE\n{}\nAFTER\n{}\nCODE\n{}".format(*part) for part in parts))


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))


class Recorded(Exception):
    """Ends a compilation after code generation: what follows needs a GPU."""


class Recorder(CustomGraphPass):
    """Takes the place of vLLM's pass manager and runs it."""

    def __init__(self, pass_manager: Any, trace: Trace, after_passes: ExitStack) -> None:
        self.pass_manager = pass_manager
        self.trace = trace
        self.after_passes = after_passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.trace.before.append(copy_of(graph))
        stock = in_module(graph)
        self.without_fusion(stock)
        self.trace.stock.append(stock)
        self.pass_manager(graph)
        self.trace.after.append(copy_of(graph))
        # Not earlier: Dynamo and vLLM would use the GPU that they believe in.
        self.after_passes.enter_context(codegen.pretended_gpu())

    def without_fusion(self, graph: torch.fx.Graph) -> None:
        rest = [each for each in self.pass_manager.passes if type(each).__name__ != RIVAL]
        with (
            patch.object(passes, "fuse", lambda graph: None),
            patch.object(self.pass_manager, "passes", rest),
        ):
            self.pass_manager(graph)

    def uuid(self) -> Any:
        return self.pass_manager.uuid()


def trace_compilation(
    model: torch.nn.Module,
    config: VllmConfig,
    mode: FakeTensorMode,
    make_inputs: Callable[[VllmConfig, torch.nn.Module], dict[str, torch.Tensor]] | None = None,
    recorder: type[Recorder] = Recorder,
) -> Trace:
    """Compile `model` as a worker does, on fake tensors, and stop before the generated code is compiled."""
    trace = Trace()
    with _recording(trace, recorder), mode, set_forward_context(None, config), torch.no_grad(), torch.device("cuda"):
        inputs = (make_inputs or _hidden_states)(config, model)
        try:
            model(**inputs)
        except Exception:
            if not trace.complete:
                raise
        finally:
            torch._dynamo.reset()
    return trace


def _hidden_states(config: VllmConfig, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    hidden_states = torch.zeros(NUM_TOKENS, config.model_config.hf_config.hidden_size, dtype=torch.bfloat16)
    return {"positions": torch.zeros(NUM_TOKENS, dtype=torch.int64), "hidden_states": hidden_states}


@contextmanager
def _recording(trace: Trace, recorder: type[Recorder]) -> Iterator[None]:
    after_passes = ExitStack()
    stock_configure = backends.VllmBackend.configure_post_pass
    stock_call = backends.VllmBackend.__call__
    stock_codegen = GraphLowering.codegen
    stock_deduce_value = UniformValueConstantFolder._deduce_value
    stock_add_peephole_patterns = UniformValueConstantFolder._add_peephole_patterns

    def configure_post_pass(backend: Any) -> None:
        stock_configure(backend)
        stock = backend.inductor_config[backend.pass_key]
        backend.inductor_config[backend.pass_key] = recorder(stock, trace, after_passes)

    def generate(lowering: GraphLowering) -> None:
        wrapper, _ = stock_codegen(lowering)
        trace.code.append(wrapper.value)
        raise Recorded

    def add_peephole_patterns(folder: Any) -> None:
        with _OnCpu():
            stock_add_peephole_patterns(folder)

    def deduce_value(folder: Any, node: torch.fx.Node) -> Any:
        """Constants are folded with real tensors."""
        kwargs = node.kwargs
        if "device" in kwargs:
            node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return stock_deduce_value(folder, node)
        finally:
            node.kwargs = kwargs

    def call(backend: Any, *args: Any, **kwargs: Any) -> None:
        stock_call(backend, *args, **kwargs)
        trace.complete = True
        raise Recorded

    with ExitStack() as stack:
        stack.enter_context(patch.object(backends.VllmBackend, "configure_post_pass", configure_post_pass))
        stack.enter_context(patch.object(backends.VllmBackend, "__call__", call))
        stack.enter_context(patch.object(GraphLowering, "codegen", generate))
        stack.enter_context(patch.object(UniformValueConstantFolder, "_deduce_value", deduce_value))
        stack.enter_context(patch.object(UniformValueConstantFolder, "_add_peephole_patterns", add_peephole_patterns))
        for adaptor in (compiler_interface.InductorAdaptor, compiler_interface.InductorStandaloneAdaptor):
            stack.enter_context(patch.object(adaptor, "compile", _stopping(adaptor.compile, after_passes)))
        yield


def _stopping(stock_compile: Callable[..., Any], after_passes: ExitStack) -> Callable[..., Any]:
    def compile_until_recorded(*args: Any, **kwargs: Any) -> tuple[Callable[..., None], None]:
        try:
            with after_passes:
                stock_compile(*args, **kwargs)
        except Exception as error:
            if not _caused_by_recording(error):
                raise
        return (lambda *_: None), None

    return compile_until_recorded


def _caused_by_recording(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, Recorded):
        error = error.__cause__ or error.__context__
    return error is not None


def in_module(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy that a pass can work on."""
    return torch.fx.GraphModule(graph.owning_module or {}, copy_of(graph)).graph


def copy_of(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
