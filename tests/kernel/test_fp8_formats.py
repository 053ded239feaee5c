# SPDX-License-Identifier: Apache-2.0
"""The four fp8 formats of the low-level op, bit for bit against torch's conversions."""

from __future__ import annotations

import pytest
import torch
from reference import FP8, Case, expected_cache, make_inputs

from vllm_mla_fusion import kernel

FNUZ = ["fp8_e4m3fnuz", "fp8_e5m2fnuz"]
FORMATS = ["fp8_e4m3", "fp8_e5m2", *FNUZ]
IS_NVIDIA = torch.version.hip is None
ON_GPU = [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in FORMATS if not (IS_NVIDIA and name in FNUZ)]
EVERYWHERE = [*(("cpu", name) for name in FORMATS), *ON_GPU]
RANK = 512


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    kernel.load()


def cached(values: torch.Tensor, kv_cache_dtype: str, device: str, scale: float = 1.0) -> torch.Tensor:
    """The bytes that the op writes for latents of these values; finite ones are compared with torch's."""
    padded = torch.cat([values, values.new_zeros(-len(values) % RANK)]).view(-1, RANK)
    case = Case("fp8", len(padded), num_heads=1, dtype=values.dtype, kv_cache_dtype=kv_cache_dtype, scale=scale)
    inputs = make_inputs(case, device)
    inputs.kv_c = padded.to(device)
    before = inputs.clone()
    kernel.op()(*inputs.args())
    if values.isfinite().all():
        assert torch.equal(inputs.cache_storage, expected_cache(before, inputs.k_pe_out))
    slots = inputs.slot_mapping
    rows = inputs.kv_cache[slots // case.block_size, slots % case.block_size, :RANK]
    return rows.flatten()[: len(values)].cpu()


@pytest.mark.parametrize(("device", "kv_cache_dtype"), EVERYWHERE)
def test_all_65536_float16_values(device: str, kv_cache_dtype: str) -> None:
    """Finite values are clamped and rounded as torch does it, infinities saturate, NaN stays NaN."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    found = cached(values, kv_cache_dtype, device)
    limit = torch.finfo(FP8[kv_cache_dtype]).max
    # torch.clamp keeps NaN.
    expected = values.float().clamp(-limit, limit).to(FP8[kv_cache_dtype])
    is_nan = values.isnan()
    assert torch.equal(found[~is_nan], expected.view(torch.uint8)[~is_nan])
    assert found[is_nan].view(FP8[kv_cache_dtype]).float().isnan().all()
    assert found[~is_nan].view(FP8[kv_cache_dtype]).float().isfinite().all()


@pytest.mark.parametrize(("device", "kv_cache_dtype"), EVERYWHERE)
def test_float32_values_around_every_rounding_boundary(device: str, kv_cache_dtype: str) -> None:
    """Each code's value, the midpoint to the next, and float32's neighbours of both; and random bit patterns."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8[kv_cache_dtype]).float()
    codes = codes[codes.isfinite()].sort().values
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    points = torch.cat([points, points.nextafter(up), points.nextafter(down)])
    random = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=torch.Generator().manual_seed(0)).int()
    values = torch.cat([points, random.view(torch.float32)])
    cached(values[values.isfinite()], kv_cache_dtype, device)


@pytest.mark.parametrize("scale", [0.37, 3.0e-5, 1.9999999, 117.3, 2.0**-20])
@pytest.mark.parametrize(("device", "kv_cache_dtype"), EVERYWHERE)
def test_quotients_are_correctly_rounded(device: str, kv_cache_dtype: str, scale: float) -> None:
    """Values whose quotient by the scale lies at or next to a rounding boundary of the format, in both dtypes."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8[kv_cache_dtype]).float()
    codes = codes[codes.isfinite()].sort().values
    boundaries = torch.cat([codes, (codes[1:] + codes[:-1]) / 2]) * torch.tensor(scale)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat([boundaries, boundaries.nextafter(up), boundaries.nextafter(down), -torch.zeros(1)])
    cached(near, kv_cache_dtype, device, scale)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    cached(bits[bits.isfinite()], kv_cache_dtype, device, scale)


def test_fnuz_has_no_negative_zero() -> None:
    values = torch.tensor([-0.0, -1e-30, 1e-30, 0.0])
    for kv_cache_dtype in FNUZ:
        assert cached(values, kv_cache_dtype, "cpu").tolist() == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", FNUZ if IS_NVIDIA else [])
def test_nvidia_builds_refuse_fnuz(kv_cache_dtype: str) -> None:
    inputs = make_inputs(Case("fnuz", 3, num_heads=1, kv_cache_dtype=kv_cache_dtype), "cuda")
    with pytest.raises(RuntimeError, match=f"'{kv_cache_dtype}' is a format of AMD GPUs"):
        kernel.op()(*inputs.args())
