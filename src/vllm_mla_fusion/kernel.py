# SPDX-License-Identifier: Apache-2.0
"""Loads the kernel's library once per process and gives its ops, `torch.ops.mla_fusion.*`.

`concat_and_cache_mla_rope_fused` does, for each of `num_tokens` tokens: rotate every head of `q_pe` and the one head of
`k_pe` by the angles of the token's position, write the rotated key to `k_pe_out`, and write `[kv_c | rotated key]` into
the token's row of the KV cache. `norm_concat_and_cache_mla_rope_fused` takes the raw latent instead: **every row** of
`kv_c_normed_out` is written with the RMSNorm of `kv_c`, and that is also what is cached. The norm is computed in
float32 and rounded once after the multiplication by the weight, as vLLM's compiled graphs do; the order of the sum is
our own, so that a value next to a rounding boundary may fall to its other side. `arguments` describes what they take.

Models with q-LoRA have a GEMM, `q_b`, between the latent's part and the query's; two ops take the place of the one:

`norms_rope_concat_and_cache_mla`, before `q_b`, does what the former does for `k_pe` and `kv_c`, and the RMSNorm of the
query's latent `q_c`, in the form that `q_b` wants: activation dtype, or float8_e4m3fn with scales. `rope_query`, after
`q_b`, rotates `q_pe` **in place** and does nothing else.

Each of those that write a cache has an overload `fresh`, which makes its outputs and returns them.

The rotation is computed in float32 and rounded once to the activation dtype; fp8 rounds that value again, as stock
vLLM does. An op runs on the device and the current stream of `q_pe` (`q_c`), never synchronises, and can be captured
in a CUDA graph. Positions and slots must be in range (checked on the CPU only). A wrong argument raises RuntimeError
with the argument, what was expected and what came, before anything is written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_mla_fusion import activation, arguments
from vllm_mla_fusion.jit import build, target
from vllm_mla_fusion.jit import library as jit_library
from vllm_mla_fusion.jit.library import Library

NAMESPACE = "mla_fusion"
# Each process of an engine asks on its own, one after the other within its start, and a compile error takes its time.
FAILURE_LASTS_SECONDS = 120.0


@functools.cache
def library() -> Library:
    """Loads the library, builds it first if need be, and registers the fakes; returns what it is and where it is from.

    Raises:
        build.BuildError: it cannot be built or loaded; the message has the compiler's output and the remedy.
    """
    found = jit_library.load(torch.ops.load_library, _say, FAILURE_LASTS_SECONDS)
    for each in arguments.OPS:
        torch.library.register_fake(f"{NAMESPACE}::{each.name}", each.fake)
        if each.outputs:
            torch.library.register_fake(f"{NAMESPACE}::{each.name}.fresh", each.fresh_fake)
    return found


def load() -> build.Target:
    """Loads `library` if need be; returns what it is for."""
    return library().target


def _say(message: str) -> None:
    activation.logger.info("MLA fusion: %s", message)


def failure() -> str | None:
    """Why the library cannot be used in this process; None if it is loaded and fits the GPU.

    Asked again it answers the same, but for a process that chooses its device meanwhile, which is judged by that.
    """
    return loading_failure() or _misfit(None if target.chosen_arch() is None else _first_chosen_arch())


@functools.cache
def loading_failure() -> str | None:
    """Why the library cannot be built or loaded."""
    try:
        load()
    except build.BuildError as error:
        return str(error)
    except Exception as error:
        # Such as ops of these names that another library registered: vLLM asks for its cache key where none may escape.
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _first_chosen_arch() -> str | None:
    """Of the device that the process chose first: another thread may be on CUDA's default."""
    return target.chosen_arch()


@functools.cache
def _misfit(chosen: str | None) -> str | None:
    reason = target.misfit(load(), chosen)
    return reason and f"The kernel does not fit: {reason}"


def failure_in_short() -> str | None:
    """The first line of `failure`, for logs that have told the rest."""
    reason = failure()
    return reason and reason.splitlines()[0].removesuffix(" The compiler says:")


@functools.cache
def overload(op: arguments.Op, name: str = "default") -> Any:
    """The kernel's op as an OpOverload, loaded if need be; `fresh`: the one that makes its outputs."""
    load()
    return getattr(getattr(getattr(torch.ops, NAMESPACE), op.name), name)


def op() -> Any:
    """`mla_fusion::concat_and_cache_mla_rope_fused` as an OpOverload, loaded if need be."""
    return overload(arguments.PLAIN)


def norm_op() -> Any:
    """`mla_fusion::norm_concat_and_cache_mla_rope_fused` as an OpOverload, loaded if need be."""
    return overload(arguments.NORM)


def norms_op() -> Any:
    """`mla_fusion::norms_rope_concat_and_cache_mla`, before `q_b`, as an OpOverload, loaded if need be."""
    return overload(arguments.NORMS)


def rope_query_op() -> Any:
    """`mla_fusion::rope_query`, after `q_b`, as an OpOverload, loaded if need be."""
    return overload(arguments.ROPE_QUERY)
