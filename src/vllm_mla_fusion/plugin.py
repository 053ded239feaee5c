# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import functools
from typing import Any

from vllm_mla_fusion import __version__, activation
from vllm_mla_fusion.activation import Mode


class UnsupportedError(RuntimeError):
    """MLA_FUSION=strict and the plugin cannot work with this vLLM, platform or machine."""


def register() -> None:
    """Hooks the fusion into the vLLM of this process if MLA_FUSION asks for it. May be called any number of times.

    Raises:
        ValueError: MLA_FUSION has an unknown value.
        Exception: only with MLA_FUSION=strict, an UnsupportedError if it was foreseen; otherwise the reason is logged
            and vLLM stays stock.
    """
    mode = activation.mode()
    if mode is Mode.OFF:
        return
    try:
        activation.norm()
        _activate(mode)
    except Exception as error:
        if mode is Mode.STRICT:
            raise
        _warn(f"could not be activated ({error!r})")


def _activate(mode: Mode) -> None:
    from vllm_mla_fusion.host import graph_dump, hooks, layer_ops, support

    is_supported, status = support.support_status()
    failed_probe = support.failed_probe() if is_supported else None
    if failed_probe is not None:
        status = f"this vLLM ({support.installed_vllm_version()}) has no {failed_probe}"
    problem = (None if is_supported and failed_probe is None else status) or support.platform_problem()
    if problem is not None:
        if mode is Mode.STRICT:
            raise UnsupportedError(f"MLA_FUSION=strict, but {problem}. Set MLA_FUSION=1 or 0 to run stock vLLM.")
        _warn(problem)
        return
    # Compiled graphs from vLLM's cache call the op without any pass having run.
    layer_ops.register()
    graph_dump.facts_from(_doctors_report)
    hooks.install_hooks(_prepare_config, _before_device, _after_warm_up)


def _doctors_report() -> Any:
    from vllm_mla_fusion.tools import doctor

    return doctor.as_json(doctor.diagnose())


def _prepare_config(vllm_config: Any, splitting_ops_are_default: bool) -> None:
    """Builds the kernel and lets the cache update into the compiled graphs, before any worker starts."""
    try:
        problem = _prepare(vllm_config, splitting_ops_are_default)
    except Exception as error:
        if activation.mode() is Mode.STRICT:
            raise
        problem = f"could not be prepared ({error!r})"
    if problem is not None:
        if activation.mode() is Mode.STRICT:
            raise UnsupportedError(_refusal(problem))
        _warn(problem)


def _before_device(vllm_config: Any) -> None:
    """A spawned worker gets a finished configuration, which `_prepare_config` never saw in its process."""
    from vllm_mla_fusion import identity
    from vllm_mla_fusion.host import config

    if config.has_mla_graphs(vllm_config) and config.config_problem(vllm_config) is None:
        identity.expect_kernel()


def _after_warm_up(vllm_config: Any, worker: Any, rank: int) -> None:
    from vllm_mla_fusion.host import report

    report.after_warm_up(vllm_config, worker, rank)


def _prepare(vllm_config: Any, splitting_ops_are_default: bool) -> str | None:
    from vllm_mla_fusion import identity, kernel
    from vllm_mla_fusion.host import config, hooks, support
    from vllm_mla_fusion.jit import target

    if not config.has_mla_graphs(vllm_config):
        return None
    problem = config.config_problem(vllm_config)
    if problem is not None:
        return problem
    if support.is_gpu_platform() and target.lacks_gpu():
        # Only drives workers: they build for the GPUs that they see, or run the update inside their graphs as it is.
        return hooks.keep_update_in_graph(vllm_config, splitting_ops_are_default)
    identity.expect_kernel()
    failure = kernel.failure()
    if failure is not None:
        return f"the kernel is not available: {failure}"
    return hooks.keep_update_in_graph(vllm_config, splitting_ops_are_default)


def _refusal(problem: str) -> str:
    """Strict mode's sentence; a problem of the build brings its own remedy along."""
    remedy = "Or set" if "What to do: " in problem else "Remove the cause, or set"
    return f"MLA_FUSION=strict, but {problem.rstrip('.')}. {remedy} MLA_FUSION=1 to run stock vLLM."


@functools.cache
def _warn(problem: str) -> None:
    """Once per start: every process, engine, and copy of a configuration has the same problem."""
    if activation.tell(problem):
        # Without host, which may be what cannot be imported.
        activation.logger.warning("MLA fusion %s is off, vLLM runs as stock: %s", __version__, problem)
