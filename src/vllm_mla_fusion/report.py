# SPDX-License-Identifier: Apache-2.0
"""Which layers of this process run the fused op, and the one line that says so."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_mla_fusion import __version__, activation, compat, kernel

# Filled while the model runs; the pass alone cannot know, since warm starts load graphs that it rewrote earlier.
_layers: dict[str, str | None] = {}
_left_alone: Counter[str] = Counter()


class NotFusedError(RuntimeError):
    """MLA_FUSION=strict and at least one MLA layer does not run the fused op."""


def saw_layer(name: str, reason: str | None) -> None:
    """The fused op ran for a layer; `reason`: why vLLM's own writer wrote its cache."""
    _layers[name] = reason


def left_alone(reasons: list[str]) -> None:
    """The pass left sites of a graph unfused, for these reasons."""
    _left_alone.update(reasons)


def _problems(vllm_config: Any) -> dict[str, str]:
    """Why each MLA layer that is not fused is not."""
    not_compiled = compat.not_compiled_reason(vllm_config)
    in_graph = "; ".join(_left_alone) or compat.config_problem(vllm_config)
    not_seen = (
        not_compiled
        or in_graph
        or (
            "its graph has no cache update beside a rotary embedding (explicit splitting_ops, a model with its own "
            "fused rotary embedding or none, or graphs from vLLM's compile cache)"
        )
    )
    problems = {}
    for name, layer in compat.mla_layers(vllm_config).items():
        reason = not_seen if name not in _layers else _layers[name] or _bound_cache_problem(layer)
        if reason is not None:
            problems[name] = reason
    return problems


def _bound_cache_problem(layer: Any) -> str | None:
    """The op's decision for a layer that so far ran only before its cache was bound."""
    cache = layer.kv_cache
    if cache.numel() == 0:
        return None
    return compat.why_not_replaced(layer, cache, layer.kv_cache_dtype, cache)


def after_warm_up(vllm_config: Any, is_first_worker: bool) -> None:
    """Logs how many MLA layers are fused; strict mode raises if one is not.

    Raises:
        NotFusedError: in strict mode, with the layers and their reasons.
    """
    layers = compat.mla_layers(vllm_config)
    if not layers:
        compat.logger.debug("MLA fusion %s: the model has no MLA layers.", __version__)
        return
    problems = _problems(vllm_config)
    if is_first_worker:
        _log(vllm_config, len(layers), problems)
    if problems and activation.mode() is activation.Mode.STRICT:
        raise NotFusedError(
            f"MLA_FUSION=strict, but {len(problems)} of {len(layers)} MLA layers are not fused: {_summary(problems)}. "
            "Remove the cause, or set MLA_FUSION=1 to run these layers as stock vLLM."
        )


def _log(vllm_config: Any, total: int, problems: dict[str, str]) -> None:
    not_compiled = compat.not_compiled_reason(vllm_config)
    if not_compiled is not None:
        compat.logger.info("MLA fusion %s: nothing to fuse, %s.", __version__, not_compiled)
        return
    fused = total - len(problems)
    level = compat.logger.info if fused else compat.logger.warning
    level("MLA fusion %s (%s): %d of %d MLA layers fused.", __version__, _backend(), fused, total)
    if problems:
        compat.logger.warning("MLA fusion: layers that run as stock vLLM: %s", _summary(problems))


def _backend() -> str:
    if kernel.failure() is not None:
        return "no kernel"
    target = kernel.load()
    return " ".join([target.backend, *target.archs])


def _summary(problems: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    )
