# SPDX-License-Identifier: Apache-2.0
"""What is kept with each MLA layer: the decision on its cache, and what ran for it until the warm-up is judged.

The pass alone cannot know what runs: warm starts load graphs that it rewrote earlier, and each compile range, compile
size and partition has a graph of its own. Nor would names do: engines of one process have layers of the same names.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mla_fusion.arguments import Op
from vllm_mla_fusion.host import cache_writer

_KEY = "_mla_fusion"


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason`: why our kernel may not write this cache, else `kernels_dtype` is its name of the cache's dtype."""

    reason: str | None
    kernels_dtype: str
    # A reference would keep memory alive that vLLM gives back, as that of its memory profile.
    cache: weakref.ref[torch.Tensor]
    data_ptr: int
    cache_dtype: str
    latents_dtype: torch.dtype
    implementation: Any

    def holds(self, layer: Any, kv_cache: torch.Tensor, cache_dtype: str, kv_c: torch.Tensor) -> bool:
        """Whether it was made for this: a cache that was bound anew, or moved by sleep mode, is looked at again."""
        bound: Any = self.cache()
        return bool(
            bound is kv_cache
            and self.data_ptr == kv_cache.data_ptr()
            and self.cache_dtype == cache_dtype
            and self.latents_dtype is kv_c.dtype
            and self.implementation is layer.impl
        )


@dataclass
class LayerState:
    """What ran for one layer. Its graphs are several, so that each entry is of all of them.

    `ops`: ours that ran; `reasons`: why vLLM's writer wrote in our op's place; `ran_stock`: a graph without our op ran;
    `packed_query`: our op was given a query of its own memory, not a part of a projection's output; `is_watched`:
    false once the warm-up is judged, which leaves the op less to do.
    """

    ops: set[Op] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    ran_stock: bool = False
    packed_query: bool = False
    is_watched: bool = True
    decision: Decision | None = None

    def __reduce__(self) -> Any:
        # A copied or pickled layer has run nothing, and weak references cannot go with it.
        return LayerState, ()

    def saw(self, op: Op, q_pe: torch.Tensor | None) -> None:
        """Our op ran."""
        self.ops.add(op)
        if q_pe is not None and q_pe.shape[0] > 1 and q_pe.stride(0) == q_pe.shape[1] * q_pe.shape[2]:
            self.packed_query = True

    def decide(self, layer: Any, kv_cache: torch.Tensor, cache_dtype: str, kv_c: torch.Tensor) -> Decision:
        """Whether our kernel may write this cache, asked once for each."""
        decision: Any = self.decision
        if decision is None or not decision.holds(layer, kv_cache, cache_dtype, kv_c):
            reason = cache_writer.why_not_replaced(layer, kv_cache, cache_dtype, kv_c.dtype)
            kernels_dtype = cache_writer.kernel_cache_dtype(cache_dtype)
            of_the_cache = (weakref.ref(kv_cache), kv_cache.data_ptr(), cache_dtype, kv_c.dtype)
            self.decision = decision = Decision(reason, kernels_dtype, *of_the_cache, layer.impl)
            if reason is not None:
                self.reasons.add(reason)
        return decision


def of(layer: Any) -> LayerState:
    """The layer's state, made if it has none."""
    try:
        return layer.__dict__[_KEY]
    except KeyError:
        return layer.__dict__.setdefault(_KEY, LayerState())


def seen(layer: Any) -> LayerState | None:
    """The layer's state if our op or a stock graph ran for it, else None."""
    state = vars(layer).get(_KEY)
    return state if state is not None and (state.ops or state.ran_stock) else None


@contextlib.contextmanager
def watching(layers: Iterable[Any]) -> Iterator[None]:
    """Notes in the block which layers' caches are written by a graph without our op: all graphs run in a warm-up.

    Our op's own calls of vLLM's writer count too; their layers have a reason.
    """
    patched = []
    for layer in layers:
        of(layer).is_watched = True
        implementation: Any = getattr(layer, "impl", None)
        if hasattr(implementation, "do_kv_cache_update"):
            implementation.do_kv_cache_update = _noting(layer, implementation.do_kv_cache_update)
            patched.append(implementation)
    try:
        yield
    finally:
        for implementation in patched:
            vars(implementation).pop("do_kv_cache_update", None)


def _noting(layer: Any, stock: Any) -> Any:
    @functools.wraps(stock)
    def do_kv_cache_update(*args: Any, **kwargs: Any) -> Any:
        of(layer).ran_stock = True
        return stock(*args, **kwargs)

    return do_kv_cache_update
