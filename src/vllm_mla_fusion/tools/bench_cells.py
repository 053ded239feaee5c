# SPDX-License-Identifier: Apache-2.0
"""What the benchmark times: sizes and types of a call, its inputs, and the calls themselves, ours and stock vLLM's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mla_fusion import kernel
from vllm_mla_fusion.host import cache_writer

TOKENS = (1, 8, 64, 256, 1024, 4096, 8192)
HEADS = (16, 128)
VARIANT_TOKENS, VARIANT_HEADS = (64, 4096), (16,)
KV_CACHE_DTYPES = ("auto", "fp8")
ROT_DIM, LORA_RANK, NOPE_DIM, Q_LORA_RANK, BLOCK_SIZE, GROUP = 64, 512, 128, 1536, 64, 128
EPSILON = 1e-6
WHOLE, BEFORE, AFTER = "whole", "before q_b", "after q_b"

Tensors = dict[str, torch.Tensor]
TimedCall = Callable[[Tensors], object]


@dataclass(frozen=True)
class Cell:
    """One combination that is timed. `q_quant` is `kernel`'s, of the op before q_b."""

    num_tokens: int
    num_heads: int
    kv_cache_dtype: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    cos_sin_dtype: torch.dtype = torch.bfloat16
    is_neox: bool = False
    norm: bool = False
    work: str = WHOLE
    q_quant: str = "none"

    @property
    def bytes_moved(self) -> int:
        """Each input read once and each output written once."""
        act = self.dtype.itemsize
        cache = act if self.kv_cache_dtype == "auto" else 1
        query = 2 * self.num_heads * ROT_DIM * act
        key = 2 * ROT_DIM * act
        latent = LORA_RANK * act
        row = (LORA_RANK + ROT_DIM) * cache
        angles = 8 + ROT_DIM * self.cos_sin_dtype.itemsize
        normed = LORA_RANK * act if self.norm or self.work == BEFORE else 0
        if self.work == AFTER:
            return self.num_tokens * (query + angles)
        rows = key + latent + row + angles + 8 + normed
        return self.num_tokens * (rows + (query if self.work == WHOLE else self._query_norm_bytes))

    @property
    def _query_norm_bytes(self) -> int:
        act = self.dtype.itemsize
        scales = {"group": Q_LORA_RANK // GROUP * 4, "token": 4}.get(self.q_quant, 0)
        return Q_LORA_RANK * (act + (act if self.q_quant == "none" else 1)) + scales


def sets(cell: Cell, count: int, device: str) -> Iterator[Tensors]:
    """The inputs and outputs of `count` calls, each in memory of its own."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, act = cell.num_tokens, cell.dtype

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(act)

    max_position = 8192
    angles = torch.rand(max_position, ROT_DIM // 2, device=device, generator=generator) * 6.3
    cos_sin_cache = torch.cat([angles.cos(), angles.sin()], -1).to(cell.cos_sin_dtype)
    cache_dtype = act if cell.kv_cache_dtype == "auto" else torch.uint8
    weight, q_weight = randn(LORA_RANK), randn(Q_LORA_RANK)
    for _ in range(count):
        num_blocks = math.ceil(tokens / BLOCK_SIZE) + 1
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device, generator=generator)[:tokens]
        qkv_a = randn(tokens, Q_LORA_RANK + LORA_RANK + ROT_DIM)
        yield {
            "positions": torch.randint(max_position, (tokens,), device=device, generator=generator),
            "q_pe": randn(tokens, cell.num_heads, NOPE_DIM + ROT_DIM)[..., NOPE_DIM:],
            "k_pe": qkv_a[:, Q_LORA_RANK + LORA_RANK :].unsqueeze(1),
            "kv_c": qkv_a[:, Q_LORA_RANK : Q_LORA_RANK + LORA_RANK],
            "cos_sin_cache": cos_sin_cache,
            "slots": slots,
            "kv_cache": torch.zeros(num_blocks, BLOCK_SIZE, LORA_RANK + ROT_DIM, device=device, dtype=cache_dtype),
            "scale": torch.tensor(0.37, device=device),
            "k_pe_out": torch.empty(tokens, 1, ROT_DIM, device=device, dtype=act),
            "weight": weight,
            "q_c": qkv_a[:, :Q_LORA_RANK],
            "q_weight": q_weight,
            "q_c_out": torch.empty(tokens, Q_LORA_RANK, device=device, dtype=_q_dtype(cell)),
            "q_scales": _q_scales(cell, device),
            "kv_c_normed_out": torch.empty(tokens, LORA_RANK, device=device, dtype=act),
        }


def _q_dtype(cell: Cell) -> torch.dtype:
    return cell.dtype if cell.q_quant == "none" else torch.float8_e4m3fn


def _q_scales(cell: Cell, device: str) -> torch.Tensor:
    """By columns, as DeepGEMM and CUTLASS want a group's."""
    columns = Q_LORA_RANK // GROUP if cell.q_quant == "group" else 1
    shape = (columns, 1 if cell.q_quant == "static" else cell.num_tokens)
    return torch.full(shape, 0.05, device=device).T


def ours(cell: Cell) -> TimedCall:
    """Our op for the work of the cell."""
    if cell.work == AFTER:
        rope = kernel.rope_query_op()
        return lambda s: rope(s["positions"], s["q_pe"], s["cos_sin_cache"], cell.is_neox)
    if cell.work == BEFORE:
        return _ours_before(cell)
    op = kernel.norm_op() if cell.norm else kernel.op()

    def call(s: Tensors) -> None:
        norm = (s["weight"], EPSILON) if cell.norm else ()
        outputs = (s["k_pe_out"], s["kv_c_normed_out"]) if cell.norm else (s["k_pe_out"],)
        inputs = (s["positions"], s["q_pe"], s["k_pe"], s["kv_c"], *norm, s["cos_sin_cache"], cell.is_neox)
        op(*inputs, s["slots"], s["kv_cache"], cell.kv_cache_dtype, s["scale"], *outputs)

    return call


def _ours_before(cell: Cell) -> TimedCall:
    op = kernel.norms_op()
    has_scales, is_static = cell.q_quant in ("group", "token"), cell.q_quant == "static"

    def call(s: Tensors) -> None:
        scales = s["q_scales"] if has_scales else None
        op(
            s["positions"], s["q_c"], s["q_weight"], EPSILON, s["k_pe"], s["kv_c"], s["weight"], EPSILON,
            s["cos_sin_cache"], cell.is_neox, s["slots"], s["kv_cache"], cell.kv_cache_dtype, s["scale"], cell.q_quant,
            True, 1 / 512, s["q_scales"] if is_static else None, s["q_c_out"], scales, s["k_pe_out"],
            s["kv_c_normed_out"],
        )  # fmt: skip

    return call


def stock_kernels() -> Any | None:
    """vLLM's ops; None where it is not installed."""
    try:
        return cache_writer.stock_kernels()
    except ImportError:
        return None


def stock(cell: Cell, ops: Any) -> dict[str, TimedCall]:
    """Stock vLLM's kernels for the same work, by the name of the column; none where it has no ops of the kind."""
    if cell.cos_sin_dtype != cell.dtype or cell.norm:
        return {}
    if cell.work == AFTER:
        return {"stock_unfused": lambda s: _stock_rope(cell, ops, s, s["q_pe"], None)}
    if cell.work == BEFORE:
        return {"stock_unfused": _stock_before(cell, ops)}

    def unfused(s: Tensors) -> None:
        _stock_rope(cell, ops, s, s["q_pe"], s["k_pe"])
        _stock_write(cell, ops, s, s["kv_c"])

    calls: dict[str, TimedCall] = {"stock_unfused": unfused}
    if hasattr(torch.ops._C_cache_ops, "concat_and_cache_mla_rope_fused"):
        calls["stock_fused"] = _stock_fused(cell, ops)
    return calls


def _stock_rope(cell: Cell, ops: Any, s: Tensors, first: torch.Tensor, second: torch.Tensor | None) -> None:
    ops.rotary_embedding(s["positions"], first, second, ROT_DIM, s["cos_sin_cache"], cell.is_neox)


def _stock_write(cell: Cell, ops: Any, s: Tensors, kv_c: torch.Tensor) -> None:
    ops.concat_and_cache_mla(kv_c, s["k_pe"].squeeze(1), s["kv_cache"], s["slots"], cell.kv_cache_dtype, s["scale"])


def _stock_fused(cell: Cell, ops: Any) -> TimedCall:
    def call(s: Tensors) -> None:
        ops.concat_and_cache_mla_rope_fused(
            s["positions"], s["q_pe"], s["k_pe"].squeeze(1), s["kv_c"], s["cos_sin_cache"], cell.is_neox, s["slots"],
            s["kv_cache"], cell.kv_cache_dtype, s["scale"],
        )  # fmt: skip

    return call


def _stock_before(cell: Cell, ops: Any) -> TimedCall:
    """Both norms, RoPE of the key and the cache write. Its quantising norms get the contiguous copy that vLLM makes."""
    namespace = torch.ops._C

    def normalise_query(s: Tensors) -> None:
        if cell.q_quant == "none":
            ops.rms_norm(s["q_c_out"], s["q_c"], s["q_weight"], EPSILON)
            return
        q_c, out, weight, scales = s["q_c"].contiguous(), s["q_c_out"], s["q_weight"], s["q_scales"]
        if cell.q_quant == "static":
            namespace.rms_norm_static_fp8_quant(out, q_c, weight, scales, EPSILON)
        elif cell.q_quant == "token":
            namespace.rms_norm_dynamic_per_token_quant(out, q_c, weight, scales, EPSILON, None, None)
        else:
            namespace.rms_norm_per_block_quant(out, q_c, weight, scales, EPSILON, None, None, GROUP, True)

    def call(s: Tensors) -> None:
        normalise_query(s)
        ops.rms_norm(s["kv_c_normed_out"], s["kv_c"], s["weight"], EPSILON)
        _stock_rope(cell, ops, s, s["k_pe"], None)
        _stock_write(cell, ops, s, s["kv_c_normed_out"])

    return call


def grid(tokens: Sequence[int] = TOKENS, heads: Sequence[int] = HEADS) -> list[Cell]:
    """The cells of the README's table, or those of other sizes."""
    return [Cell(t, h, d) for d in KV_CACHE_DTYPES for h in heads for t in tokens]


def around_q_b(tokens: Sequence[int] = TOKENS, heads: Sequence[int] = HEADS) -> list[Cell]:
    """The op before q_b in the forms that checkpoints want, and the one after it for each number of heads."""
    before = [Cell(t, 0, work=BEFORE, q_quant=q) for q in ("group", "none", "token", "static") for t in tokens]
    return before + [Cell(t, h, work=AFTER) for h in heads for t in tokens]


def variants(tokens: Sequence[int] = VARIANT_TOKENS, heads: Sequence[int] = VARIANT_HEADS) -> list[Cell]:
    """The other pairings and types, each at each size."""
    cells = []
    for t, h in itertools.product(tokens, heads):
        cells += [Cell(t, h), Cell(t, h, is_neox=True), Cell(t, h, dtype=torch.float16, cos_sin_dtype=torch.float16)]
        cells += [Cell(t, h, cos_sin_dtype=torch.float32), Cell(t, h, "fp8"), Cell(t, h, "fp8_e5m2")]
        cells += [Cell(t, h, norm=True), Cell(t, h, "fp8", norm=True)]
    return cells
