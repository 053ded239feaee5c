# SPDX-License-Identifier: Apache-2.0
"""Inputs of the kernel in the layouts that vLLM gives it, and an independent float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}
# FlashMLA's sparse layout: 512 bytes of latent in e4m3, a float32 scale for each 128, 64 rope values in 16 bits.
DS_MLA = "fp8_ds_mla"
DS_MLA_ROW_BYTES = 656


@dataclass(frozen=True)
class Case:
    """One set of sizes and layouts. `num_slots`: None is num_tokens; `padding`: every n-th slot is -1."""

    name: str
    num_tokens: int
    num_heads: int
    rot_dim: int = 64
    lora_rank: int = 512
    nope_dim: int = 128
    kv_extra: int = 0  # columns of the qkv_a output before kv_c (q_lora_rank)
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    cos_sin_dtype: torch.dtype | None = None
    kv_cache_dtype: str = "auto"
    is_neox: bool = False
    num_slots: int | None = None
    padding: int = 0
    slot_tail: int = 0  # entries of slot_mapping behind the tokens': -1, or out of any range; nobody reads them
    row_pad: int = 0  # unused cache elements behind each row
    block_pad: int = 0  # unused cache elements behind each block
    q_shift: int = 0  # elements by which q_pe is moved off its alignment
    positions_dtype: torch.dtype = torch.int64
    scale: float = 0.37
    norm: bool = False
    epsilon: float = 1e-6
    cos_sin_pad: int = 0  # unused columns behind each row of cos_sin_cache
    key_extra: int | None = None  # k_pe and kv_c in buffers of their own, k_pe's with as many more columns

    def but(self, **changes) -> Case:
        return replace(
            self, name="-".join([self.name, *(f"{key}={value}" for key, value in changes.items())]), **changes
        )


@dataclass
class Inputs:
    """Arguments of `concat_and_cache_mla_rope_fused`, by name; `cache_storage` is the memory that kv_cache views."""

    positions: torch.Tensor
    q_pe: torch.Tensor
    k_pe: torch.Tensor
    kv_c: torch.Tensor
    cos_sin_cache: torch.Tensor
    is_neox: bool
    slot_mapping: torch.Tensor
    kv_cache: torch.Tensor
    kv_cache_dtype: str
    kv_cache_scale: torch.Tensor
    k_pe_out: torch.Tensor
    cache_storage: torch.Tensor
    query: torch.Tensor
    kv_c_weight: torch.Tensor | None = None
    epsilon: float = 1e-6
    kv_c_normed_out: torch.Tensor | None = None
    qkv_a: torch.Tensor | None = None

    def args(self) -> tuple:
        """In the order of the op, of the one with norm if there is a weight."""
        names = list(self.__dataclass_fields__)[:11]
        if self.kv_c_weight is not None:
            names[4:4] = ["kv_c_weight", "epsilon"]
            names.append("kv_c_normed_out")
        return tuple(getattr(self, name) for name in names)

    def clone(self) -> Inputs:
        query = self.query.clone()
        storage = self.cache_storage.clone()
        return replace(
            self,
            query=query,
            q_pe=query.as_strided(self.q_pe.shape, self.q_pe.stride(), self.q_pe.storage_offset()),
            cache_storage=storage,
            kv_cache=storage.as_strided(self.kv_cache.shape, self.kv_cache.stride(), self.kv_cache.storage_offset()),
            k_pe_out=self.k_pe_out.clone(),
            kv_c_normed_out=None if self.kv_c_normed_out is None else self.kv_c_normed_out.clone(),
        )


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Strided views, shuffled slots, poisoned outputs and random bytes in the cache."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    num_tokens, width = case.num_tokens, case.lora_rank + case.rot_dim
    head_dim = case.nope_dim + case.rot_dim
    query = randn(num_tokens * case.num_heads * head_dim + case.q_shift)
    heads = query[case.q_shift :].view(num_tokens, case.num_heads, head_dim)
    qkv_a = randn(num_tokens, case.kv_extra + width)
    k_pe = qkv_a[:, case.kv_extra + case.lora_rank :]
    if case.key_extra is not None:
        k_pe = randn(num_tokens, case.key_extra + case.rot_dim)[:, case.key_extra :]
    if case.norm:
        qkv_a[::5] = 0  # where the norm shows its epsilon, and nothing else
    max_position = 4 * num_tokens + 8
    angles = torch.rand(max_position, case.rot_dim // 2, generator=generator) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1) * 1.1
    padded_cos_sin = torch.nn.functional.pad(cos_sin, (0, case.cos_sin_pad), value=float("nan"))
    positions = torch.randint(max_position, (num_tokens,), generator=generator, dtype=case.positions_dtype)

    num_slots = num_tokens if case.num_slots is None else case.num_slots
    num_blocks = num_slots // case.block_size + 3
    slots = torch.randperm(num_blocks * case.block_size, generator=generator)[:num_slots]
    if case.padding:
        slots[:: case.padding] = -1
    slots = torch.cat([slots, torch.tensor([-1, 1 << 40]).repeat(case.slot_tail)[: case.slot_tail]])
    is_ds_mla = case.kv_cache_dtype == DS_MLA
    cache_dtype = torch.uint8 if is_ds_mla or case.kv_cache_dtype in FP8 else case.dtype
    cache_width = DS_MLA_ROW_BYTES if is_ds_mla else width
    row_stride = cache_width + case.row_pad
    block_stride = case.block_size * row_stride + case.block_pad
    storage = torch.randint(
        0, 256, (num_blocks * block_stride * cache_dtype.itemsize,), generator=generator, dtype=torch.uint8
    )
    storage = storage.to(device).view(cache_dtype)
    return Inputs(
        positions=positions.to(device),
        q_pe=heads[..., case.nope_dim :],
        k_pe=k_pe.unsqueeze(1),
        kv_c=qkv_a[:, case.kv_extra : case.kv_extra + case.lora_rank],
        cos_sin_cache=padded_cos_sin.to(case.cos_sin_dtype or case.dtype).to(device)[:, : case.rot_dim],
        is_neox=case.is_neox,
        slot_mapping=slots.to(device),
        kv_cache=storage.as_strided((num_blocks, case.block_size, cache_width), (block_stride, row_stride, 1)),
        kv_cache_dtype=case.kv_cache_dtype,
        kv_cache_scale=torch.tensor(case.scale, device=device),
        k_pe_out=torch.full((num_tokens, 1, case.rot_dim), float("nan"), dtype=case.dtype, device=device),
        cache_storage=storage,
        query=query,
        kv_c_weight=randn(case.lora_rank) + 1 if case.norm else None,
        epsilon=case.epsilon,
        qkv_a=qkv_a,
        kv_c_normed_out=torch.full_like(qkv_a[:, : case.lora_rank], float("nan")).contiguous() if case.norm else None,
    )


def rotate(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """RoPE in float64; x is [num_tokens, heads, rot_dim]."""
    angles = inputs.cos_sin_cache.double()[inputs.positions.long()].unsqueeze(1)
    cos, sin = angles.chunk(2, -1)
    x = x.double()
    if inputs.is_neox:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    out = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


# A sum of 512 squares in float32, in another order.
NORM_ERROR = 4e-6


def rms_norm(inputs: Inputs) -> torch.Tensor:
    """RMSNorm of the latent in float64."""
    return rms(inputs.kv_c, inputs.epsilon) * inputs.kv_c_weight.double()


def rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm without weight in float64."""
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def quantise(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Values as the cache stores them; fp8 as bytes."""
    if inputs.kv_cache_dtype not in FP8:
        return x
    target = FP8[inputs.kv_cache_dtype]
    limit = torch.finfo(target).max
    return (x.float() / inputs.kv_cache_scale).clamp(-limit, limit).to(target).view(torch.uint8)


def ds_mla_rows(latent: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Rows of fp8_ds_mla as bytes; a tile's scale is its largest magnitude over 448, and no subnormal."""
    # On the CPU: torch on a GPU multiplies by the rounded reciprocal of 448 instead of dividing.
    tiles = latent.float().cpu().unflatten(-1, (-1, 128))
    scales = (tiles.abs().amax(-1) / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
    values = (tiles / scales.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(-2)
    return torch.cat([part.contiguous().view(torch.uint8).to(key.device) for part in (values, scales, key)], -1)


def expected_cache(inputs: Inputs, k_pe_out: torch.Tensor, latent: torch.Tensor | None = None) -> torch.Tensor:
    """The cache's memory after the write of the given rotated key and latent (kv_c); `inputs` as before the call."""
    storage = inputs.cache_storage.clone()
    cache = storage.as_strided(inputs.kv_cache.shape, inputs.kv_cache.stride())
    latent = inputs.kv_c if latent is None else latent
    if inputs.kv_cache_dtype == DS_MLA:
        rows = ds_mla_rows(latent, k_pe_out.squeeze(1))
    else:
        rows = quantise(torch.cat([latent, k_pe_out.squeeze(1)], -1), inputs)
    slots = inputs.slot_mapping[: len(rows)].tolist()
    for slot, row in zip(slots, rows[: len(slots)], strict=True):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = row
    return storage


def assert_within_one_rounding(actual: torch.Tensor, exact: torch.Tensor, float32_error: float = 1e-6) -> None:
    """`actual` is `exact` rounded once to its dtype, give or take float32 arithmetic before the rounding.

    Args:
        float32_error: of that arithmetic, relative to results above one and absolute below.
    """
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs()
    allowed = exact.abs() * torch.finfo(actual.dtype).eps * 0.5 + exact.abs().clamp(min=1.0) * float32_error
    worst = (error - allowed).max() if error.numel() else torch.zeros(())
    assert worst <= 0, f"off by {worst:.3e} more than one rounding"
