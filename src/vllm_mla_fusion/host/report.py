# SPDX-License-Identifier: Apache-2.0
"""Which layers of this process run the fused op, and the one line that says so."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm_mla_fusion import __version__, activation, kernel
from vllm_mla_fusion.arguments import NORM, NORMS, ROPE_QUERY
from vllm_mla_fusion.host import cache_writer, config, layer_state, layers, ranks, support
from vllm_mla_fusion.host.layer_state import LayerState

_left_alone: Counter[str] = Counter()

NO_ROPE = "no rotary embedding leads to the key that is cached"
NOT_SEEN = (
    "its graph has no cache update beside a rotary embedding (explicit splitting_ops, a model with its own fused "
    "rotary embedding or none, or graphs from vLLM's compile cache)"
)
STOCK_GRAPH = "the pass left them alone in an earlier start, whose log has the reason; they are in vLLM's compile cache"


class NotFusedError(RuntimeError):
    """MLA_FUSION=strict and at least one MLA layer does not run the fused op."""


@dataclass
class _Judgement:
    """Why layers are not fused, by name: those that could have been, and those that never had anything to fuse.

    `copying`: how many fused layers rotate a query that was copied for it.
    """

    problems: dict[str, str] = field(default_factory=dict)
    patternless: dict[str, str] = field(default_factory=dict)
    copying: int = 0


def left_alone(reasons: list[str], without_rope: int = 0) -> None:
    """The pass left sites of a graph unfused: for these reasons, and so many because their key is not rotated."""
    _left_alone.update(reasons)
    if without_rope:
        _left_alone[NO_ROPE] += without_rope


def _judge(vllm_config: Any, mla: dict[str, Any], worker: Any) -> _Judgement:
    not_seen = _why_not_seen(vllm_config) if mla else NOT_SEEN
    own_code = layers.layers_with_own_code(vllm_config, worker)
    judgement = _Judgement()
    for name, layer in mla.items():
        state = layer_state.seen(layer)
        own = own_code.get(name)
        if state is not None and state.ops:
            reason = _problem_of_the_fused(layer, state)
            if reason is not None:
                judgement.problems[name] = reason
            elif own is None:
                # vLLM's wrapper makes the query's parts in one; a model's own code may have them apart.
                judgement.copying += state.packed_query
        elif own is not None and (own.certain or not_seen in (NO_ROPE, NOT_SEEN)):
            judgement.patternless[name] = own.reason
        else:
            judgement.problems[name] = not_seen
    return judgement


def _why_not_seen(vllm_config: Any) -> str:
    """Why a layer may be one for which the op did not run."""
    config_problem = config.not_compiled_reason(vllm_config) or config.config_problem(vllm_config)
    if config_problem is not None:
        return config_problem
    kernel_problem = kernel.failure_in_short()
    if kernel_problem is not None:
        return f"the kernel is not available: {kernel_problem}"
    return "; ".join(_left_alone) or NOT_SEEN


def _problem_of_the_fused(layer: Any, state: LayerState) -> str | None:
    """What keeps a layer for which our op ran from being fused in all of its runs."""
    if state.reasons:
        return "; ".join(sorted(state.reasons))
    if state.ran_stock:
        return f"some of its graphs run as stock vLLM: {'; '.join(_left_alone) or STOCK_GRAPH}"
    if state.decision is not None:
        return None
    # So far it ran only before its cache was bound.
    cache = layer.kv_cache
    return cache_writer.why_not_replaced(layer, cache, layer.kv_cache_dtype, cache.dtype) if cache.numel() else None


def after_warm_up(vllm_config: Any, worker: Any, rank: int) -> None:
    """Logs how many MLA layers are fused, once per engine, and the problems of its other ranks, once per host.

    Raises:
        NotFusedError: in strict mode, with the layers and their reasons.
    """
    found = layers.mla_layers(vllm_config)
    judgement = _judge(vllm_config, found, worker)
    for layer in found.values():
        layer_state.of(layer).is_watched = False
    is_told = bool(judgement.problems) and config.not_compiled_reason(vllm_config) is None
    words = _summary(judgement.problems) if is_told else ""
    speakers = ranks.who_speaks(vllm_config.parallel_config, rank, words)
    if rank == 0:
        _log(vllm_config, found, judgement)
    elif speakers:
        _warn_of(judgement.problems, f" {__version__} on host {speakers}")
    _left_alone.clear()
    not_fused = judgement.problems | judgement.patternless
    if not_fused and activation.mode() is activation.Mode.STRICT:
        raise NotFusedError(
            f"MLA_FUSION=strict, but {len(not_fused)} of {len(found)} MLA layers are not fused: "
            f"{_summary(not_fused)}. Remove the cause, or set MLA_FUSION=1 to run these layers as stock vLLM."
        )


def _log(vllm_config: Any, mla: dict[str, Any], judgement: _Judgement) -> None:
    not_compiled = config.not_compiled_reason(vllm_config)
    if len(judgement.patternless) == len(mla):
        why = _summary(judgement.patternless) or "the model has no MLA layers"
        activation.logger.debug("MLA fusion %s: nothing to fuse, %s.", __version__, why)
        return
    if not_compiled is not None:
        activation.logger.info("MLA fusion %s: nothing to fuse, %s.", __version__, not_compiled)
        return
    untested = support.untested_release()
    if untested is not None:
        activation.logger.info("MLA fusion %s is untested here: %s.", __version__, untested)
    fused = [layer for name, layer in mla.items() if name not in judgement.problems | judgement.patternless]
    if fused:
        _log_fused(fused, len(mla), vllm_config.parallel_config.pipeline_parallel_size, judgement.copying)
    if judgement.patternless:
        activation.logger.debug("MLA fusion: layers without anything to fuse: %s", _summary(judgement.patternless))
    if judgement.problems:
        total = "" if fused else f" {__version__}: 0 of {len(mla)} MLA layers fused"
        _warn_of(judgement.problems, total)


def _log_fused(fused: list[Any], count: int, pipeline_stages: int, copying: int) -> None:
    library = kernel.library()
    backend = f"{' '.join([library.target.backend, *library.target.archs])}, {library.origin}"
    ran, around_q_b = [layer_state.of(layer).ops for layer in fused], {NORMS, ROPE_QUERY}
    with_both = sum(ops <= around_q_b for ops in ran)
    with_latents = sum(ops <= around_q_b | {NORM} for ops in ran) - with_both
    norm = f", {with_both} with both norms" if with_both else ""
    norm += f", {with_latents} with the latent's RMSNorm" if with_latents else ""
    copies = f", {copying} on a copy of the query, which cannot be rotated where it lies" if copying else ""
    # Other stages' layers are in other processes, which speak only of problems.
    stage = f" in the first of {pipeline_stages} pipeline stages" if pipeline_stages > 1 else ""
    message = "MLA fusion %s (%s): %d of %d MLA layers fused%s%s%s."
    activation.logger.info(message, __version__, backend, len(fused), count, stage, norm, copies)


def _warn_of(problems: dict[str, str], where: str = "") -> None:
    # What was told before the engine had its workers is no second WARNING.
    level = logging.INFO if all(activation.is_told(reason) for reason in problems.values()) else logging.WARNING
    activation.logger.log(level, "MLA fusion%s: layers that run as stock vLLM: %s", where, _summary(problems))


def _summary(problems: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    )
