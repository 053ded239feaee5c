# SPDX-License-Identifier: Apache-2.0
"""Loads the kernel's library once per process and gives `torch.ops.mla_fusion.concat_and_cache_mla_rope_fused`.

That op does, for each of `num_tokens` tokens: rotate every head of `q_pe` and the one head of `k_pe` by the angles of
the token's position, write the rotated key to `k_pe_out`, and write `[kv_c | rotated key]` into the token's row of the
KV cache. `torch.ops.mla_fusion.norm_concat_and_cache_mla_rope_fused` takes the raw latent instead: **every row** of
`kv_c_normed_out` is written with the RMSNorm of `kv_c`, and that is also what is cached. The norm is computed in
float32 and rounded once after the multiplication by the weight, as vLLM's compiled graphs do; the order of the sum is
our own, so that a value next to a rounding boundary may fall to its other side. `arguments` describes what they take.

The rotation is computed in float32 and rounded once to the activation dtype; fp8 rounds that value again, as stock
vLLM does. The op runs on the device and the current stream of `q_pe`, never synchronises, and can be captured in a CUDA
graph. Positions and slots must be in range (checked on the CPU only). A wrong argument raises RuntimeError with the
argument, what was expected and what came, before anything is written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_mla_fusion import activation, arguments
from vllm_mla_fusion.jit import build, target

NAMESPACE = "mla_fusion"
# Each process of an engine asks on its own, one after the other within its start, and a compile error takes its time.
FAILURE_LASTS_SECONDS = 120.0
LOAD_REMEDY = "Run `vllm-mla-fusion clean`, then `vllm-mla-fusion build`, on this machine or in the image that serves."


@functools.cache
def load() -> build.Target:
    """Builds the library if it is not in the cache, loads it and registers the fakes; returns what it is for.

    Raises:
        build.BuildError: it cannot be built or loaded; the message has the compiler's output and the remedy.
    """
    wanted = build.detect_target()
    library = build.build(wanted, say=_say, failure_lasts=FAILURE_LASTS_SECONDS)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise build.BuildError(
            f"The built kernel {library} does not load: {error.__cause__ or error}", LOAD_REMEDY
        ) from error
    for each in arguments.OPS:
        torch.library.register_fake(f"{NAMESPACE}::{each.name}", each.fake)
    return wanted


def _say(message: str) -> None:
    activation.logger.info("MLA fusion: %s", message)


@functools.cache
def failure() -> str | None:
    """Why the library cannot be used in this process; None if it is loaded and fits the GPUs.

    Asked again it answers the same.
    """
    try:
        reason = target.misfit(load())
    except build.BuildError as error:
        return str(error)
    except Exception as error:
        # Such as ops of these names that another library registered: vLLM asks for its cache key where none may escape.
        return f"{type(error).__name__}: {error}"
    return reason and f"The kernel does not fit: {reason}"


def failure_in_short() -> str | None:
    """The first line of `failure`, for logs that have told the rest."""
    reason = failure()
    return reason and reason.splitlines()[0].removesuffix(" The compiler says:")


@functools.cache
def overload(op: arguments.Op) -> Any:
    """The kernel's op as an OpOverload, loaded if need be."""
    load()
    return getattr(getattr(torch.ops, NAMESPACE), op.name).default


def op() -> Any:
    """`mla_fusion::concat_and_cache_mla_rope_fused` as an OpOverload, loaded if need be."""
    return overload(arguments.PLAIN)


def norm_op() -> Any:
    """`mla_fusion::norm_concat_and_cache_mla_rope_fused` as an OpOverload, loaded if need be."""
    return overload(arguments.NORM)
