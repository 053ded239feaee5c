# SPDX-License-Identifier: Apache-2.0
"""The hipified launch and device code, executed on the CPU, against the float64 reference.

Why this says something about a GPU: what is compiled here is hipify's output for csrc/, the same text that hipcc gets,
with a header in place of ROCm's that gives `threadIdx`, the launch and the shuffles their documented meaning. The
launch code chooses kernel, grid and block as it would on a GPU; every thread of the grid runs. So indexing, masking,
padding, alignment (the undefined-behaviour sanitizer stops a misaligned 16-byte access) and the bit-level conversions
are those of the GPU. Lanes of a wave run one after the other, in ascending order with waves of 32 and in descending
order with waves of 64: a result that depends on the order of lanes without a shuffle between them would differ. What it
cannot show is a fault of the compiler, of the hardware or of memory ordering between blocks, of which the kernel uses
none, and speed.
"""

from __future__ import annotations

import pytest
import torch
from hip_build import Emulation, build_emulation
from reference import Case, Inputs, assert_within_one_rounding, expected_cache, make_inputs, rotate
from test_kernel import CASES, V2_LITE, V3_RANK

WAVES = [pytest.param(32, False, id="wave32"), pytest.param(64, True, id="wave64")]
ROCM_CASES = [
    *CASES,
    V2_LITE.but(kv_cache_dtype="fp8_e4m3fnuz", padding=5),
    V3_RANK.but(kv_cache_dtype="fp8_e5m2fnuz", dtype=torch.float16, scale=0.0001),
    V2_LITE.but(kv_cache_dtype="fp8_e4m3fnuz", rot_dim=96, lora_rank=100, is_neox=True),  # the general path
]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return build_emulation(tmp_path_factory.mktemp("emulation"))


@pytest.mark.parametrize(("wave_size", "last_lane_first"), WAVES)
@pytest.mark.parametrize("case", ROCM_CASES, ids=lambda case: case.name)
def test_against_float64(case: Case, wave_size: int, last_lane_first: bool, emulation: Emulation) -> None:
    inputs = make_inputs(case)
    result = inputs.clone()
    emulation.run(result.args(), wave_size, last_lane_first)
    assert_result(result, inputs)


def assert_result(result: Inputs, inputs: Inputs) -> None:
    assert_within_one_rounding(result.q_pe, rotate(inputs.q_pe, inputs))
    assert_within_one_rounding(result.k_pe_out, rotate(inputs.k_pe, inputs))
    untouched = result.query.clone()
    untouched.as_strided(inputs.q_pe.shape, inputs.q_pe.stride(), inputs.q_pe.storage_offset()).copy_(inputs.q_pe)
    assert torch.equal(untouched.view(torch.uint8), inputs.query.view(torch.uint8))
    expected = expected_cache(inputs, result.k_pe_out)
    assert torch.equal(result.cache_storage.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"])
def test_every_float16_value_in_fp8(kv_cache_dtype: str, emulation: Emulation) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = torch.where(values.isfinite(), values, 0).view(-1, 512)
    case = Case("all", len(values), num_heads=1, dtype=torch.float16, kv_cache_dtype=kv_cache_dtype, scale=1.0)
    inputs = make_inputs(case)
    inputs.kv_c = values
    result = inputs.clone()
    emulation.run(result.args(), 64, False)
    assert torch.equal(result.cache_storage, expected_cache(inputs, result.k_pe_out))
