# SPDX-License-Identifier: Apache-2.0
"""The steps of `fx` as passes of vLLM's pass manager and of Inductor."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from vllm_mla_fusion import activation, arguments, identity, kernel
from vllm_mla_fusion.fx import fusion, in_place
from vllm_mla_fusion.fx.ops import FusionOps, Quantiser, RotaryOp, everywhere
from vllm_mla_fusion.host import graph_dump, layer_ops, report, support
from vllm_mla_fusion.host.config import config_problem, update_problem
from vllm_mla_fusion.host.support import INDUCTOR_PASS, MLA_ATTENTION, PATCHED

POST_GRAD_HOOK = "post_grad_custom_post_pass"


def fusion_ops() -> FusionOps:
    """The ops of the vLLM at hand. Importing its MLA layer registers them."""
    importlib.import_module(MLA_ATTENTION)
    rotary = []
    for namespace, name in (
        ("_C", "rotary_embedding"),
        ("vllm", "flashinfer_rotary_embedding"),
        ("vllm", "rocm_aiter_triton_rotary_embedding"),
    ):
        target = _op(namespace, name)
        if target is not None:
            rotary.append(RotaryOp(target))
    ops = layer_ops.register()
    norm = activation.norm()
    layouts = tuple((name, functools.partial(arguments.scale_strides, name)) for name in arguments.SCALE_LAYOUTS)
    return FusionOps(
        update=torch.ops.vllm.unified_mla_kv_cache_update.default,
        fused=ops.plain,
        rotary=tuple(rotary),
        fused_norm=None if norm is activation.Norm.NEVER else ops.norm,
        rms_norm=_op("vllm_ir", "rms_norm"),
        rms_norm_out=_op("_C", "rms_norm"),
        norm_beside_others=norm is activation.Norm.ALWAYS,
        norms=None if norm is activation.Norm.NEVER else ops.norms,
        rope_query=ops.rope_query,
        rope_query_in_place=ops.rope_query_in_place,
        quantisers=_quantisers(),
        scale_layouts=layouts,
        takes_norms=everywhere if norm is activation.Norm.ALWAYS else _wins,
    )


def _quantisers() -> tuple[Quantiser, ...]:
    """vLLM's ops whose bytes our kernel writes too, with their roundings as measured, see `arguments.Arguments`."""
    alone = functools.partial(Quantiser, has_norm=False)
    with_norm = functools.partial(Quantiser, has_norm=True)
    twice = functools.partial(with_norm, rounds_twice=True, smallest=1 / 512)
    known: dict[str, Callable[[Any], Quantiser]] = {
        "rms_norm_per_block_quant": functools.partial(twice, quant="group"),
        "rms_norm_dynamic_per_token_quant": functools.partial(twice, quant="token"),
        "rms_norm_static_fp8_quant": functools.partial(with_norm, quant="static"),
        "per_token_group_fp8_quant": functools.partial(alone, quant="group", result="output_q", scale="output_s"),
        "dynamic_per_token_scaled_fp8_quant": functools.partial(alone, quant="token", smallest=1 / 512),
        "static_scaled_fp8_quant": functools.partial(alone, quant="static"),
    }
    found = ((_op("_C", name), make) for name, make in known.items())
    return tuple(make(target) for target, make in found if target is not None)


def _wins(is_neox: bool, dtype: torch.dtype, q_lora_rank: int) -> bool:
    """Where the op with both norms was measured to win: NVIDIA's compute capability 9, in the vector kernel."""
    in_vectors = not is_neox and dtype in (torch.bfloat16, torch.float16) and q_lora_rank <= 2048
    return in_vectors and support.is_compute_capability(9)


def _op(namespace: str, name: str) -> Any | None:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default


def fuse(graph: fx.Graph) -> None:
    """Runs the fusion and remembers for the report why sites were left alone.

    Raises:
        PassFailedError: only in strict mode: the pass failed. Otherwise a server does not stop for it.
    """
    before = None
    try:
        ops = fusion_ops()
        if not graph.find_nodes(op="call_function", target=ops.update):
            return
        # The report tells of a kernel that is not available, whatever the graphs look like.
        if kernel.failure() is not None:
            return
        before = graph_dump.copy_of(graph)
        result = fusion.fuse(graph, ops)
        report.left_alone(result.reasons, result.without_rope)
        errors = result.errors
        what = "the pass could not read a part of a graph, which runs as stock vLLM"
    except Exception as error:
        report.left_alone([f"the pass failed: {error!r}"])
        errors, what = [error], "the pass failed; this graph runs as stock vLLM"
    for each in errors:
        graph_dump.pass_failed(what, each, before or graph)


def defunctionalise(graph: fx.Graph) -> None:
    """Runs the last step of the fusion, which must not be left out: functional calls compute something else there.

    Raises:
        Exception: the step failed twice. Compiling must end here: tokens would be wrong.
        PassFailedError: only in strict mode: it failed once.
    """
    ops = fusion_ops()
    before = graph_dump.copy_of(graph) if in_place.has_calls(graph, ops) else None
    result = in_place.defunctionalise(graph, ops)
    if result.error is not None:
        graph_dump.pass_failed(
            "the pass failed in its last step; this graph copies q_pe", result.error, before or graph
        )


class InductorHook(CustomGraphPass):
    """Both steps in Inductor's post-grad hook, after the user's own pass if there is one.

    Of this base class because Inductor does not cache a graph that any other callable worked on.
    """

    def __init__(self, users_pass: Any) -> None:
        self._users_pass = users_pass
        setattr(self, PATCHED, True)

    def __call__(self, graph: fx.Graph) -> None:
        if self._users_pass is not None:
            self._users_pass(graph)
        fuse(graph)
        defunctionalise(graph)

    def uuid(self) -> str | None:
        """None, which keeps Inductor from caching the graph, if the user's pass has no id."""
        if self._users_pass is None:
            return identity.compile_cache_key()
        users = getattr(self._users_pass, "uuid", lambda: None)()
        return None if users is None else f"{identity.compile_cache_key()}:{users}"


def __getattr__(name: str) -> Any:
    # Made on demand: vLLM's pass manager is heavy to import and only workers that compile need it.
    if name == "FusionPassManager":
        try:
            return _pass_manager_class()
        except Exception as error:
            _leave_pass_manager_alone(error)
            return _stock_pass_manager()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_stock_name: list[str] = []


def remember_stock_pass_manager(qualified_name: str) -> None:
    """Of which class `FusionPassManager` will be derived."""
    _stock_name[:] = [qualified_name]


def _stock_pass_manager() -> Any:
    module, _, name = _stock_name[0].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _leave_pass_manager_alone(error: Exception) -> None:

    problem = f"the plugin does not know this vLLM's pass manager ({error!r})"
    if activation.mode() is activation.Mode.STRICT:
        raise RuntimeError(f"MLA_FUSION=strict, but {problem}. Set MLA_FUSION=1 or 0 to run stock vLLM.") from error
    report.left_alone([problem])


@functools.cache
def _pass_manager_class() -> type:
    inductor_pass = importlib.import_module(INDUCTOR_PASS).InductorPass

    class FusionPass(inductor_pass):  # type: ignore[misc, valid-type]
        def __call__(self, graph: fx.Graph) -> None:
            fuse(graph)

        def uuid(self) -> str:
            return f"mla_fusion:{identity.compile_cache_key()}"

    class ThenDefunctionalise(inductor_pass):  # type: ignore[misc, valid-type]
        """vLLM's last pass, and ours after it: nothing may sort or clean the graph behind an in-place call."""

        def __init__(self, last: Any) -> None:
            self._last = last

        def __call__(self, graph: fx.Graph) -> None:
            self._last(graph)
            defunctionalise(graph)

        def uuid(self) -> str:
            return f"{self._last.uuid()}:{identity.compile_cache_key()}"

    class FusionPassManager(_stock_pass_manager()):  # type: ignore[misc]
        """vLLM's pass manager with our two steps: before its own MLA fusion, and after everything."""

        fix_functionalization: Any

        def configure(self, config: Any) -> None:
            super().configure(config)
            try:
                problem = update_problem(config) or config_problem(config)
                if problem is not None:
                    report.left_alone([problem])
                    return
                last = ThenDefunctionalise(self.fix_functionalization)
                self.passes.insert(_position(self.passes), FusionPass())
                self.fix_functionalization = last
            except Exception as error:
                _leave_pass_manager_alone(error)

    return FusionPassManager


def _position(passes: Iterable[Any]) -> int:
    names = [type(each).__name__ for each in passes]
    rival = "MLARoPEKVCacheCatFusionPass"
    return names.index(rival) if rival in names else len(names)


def hook_inductor(config: Any) -> None:
    """Puts both steps into the post-grad hook of a CompilationConfig."""
    users_pass = config.inductor_compile_config.get(POST_GRAD_HOOK)
    if not getattr(users_pass, PATCHED, False):
        config.inductor_compile_config[POST_GRAD_HOOK] = InductorHook(users_pass)
