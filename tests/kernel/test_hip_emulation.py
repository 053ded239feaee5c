# SPDX-License-Identifier: Apache-2.0
"""The hipified launch and device code, executed on the CPU, in the tests that the GPU runs.

Why this says something about a GPU: what is compiled here is hipify's output for csrc/, the same text that hipcc
gets, with a header in place of ROCm's that gives `threadIdx`, the launch and the shuffles their documented meaning.
The launch code chooses kernel, grid and block as it would on a GPU, and every thread of the grid runs. So indexing,
masking, padding, alignment (the undefined-behaviour sanitizer stops a misaligned 16-byte access) and the bit-level
conversions are those of the GPU. Lanes run one after the other between shuffles, in ascending order with waves of 32
and in descending order with waves of 64: a result that needs lanes in lockstep without a shuffle between them would
differ, and a shuffle with a lane that is not there, or not in the same branch, ends the test.

What it cannot show: a fault of the compiler or the hardware, the order of memory accesses between blocks (no block
reads what another writes), a contraction of a product and a sum, which AMD's compiler makes and which stays within
the same rounding bound, and speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_fp8_formats
import test_kernel
import test_query_norm
import torch
from hip_build import Emulation, build_emulation
from reference import Case
from test_kernel import V2_LITE, V3_RANK

from vllm_mla_fusion import kernel

pytestmark = pytest.mark.slow

CASES = [
    *test_kernel.CASES,
    *test_kernel.NORM_CASES,
    *test_kernel.DS_MLA_CASES,
    V2_LITE.but(kv_cache_dtype="fp8_e4m3fnuz", padding=5),
    V3_RANK.but(kv_cache_dtype="fp8_e5m2fnuz", dtype=torch.float16, scale=0.0001),
    V2_LITE.but(kv_cache_dtype="fp8_e4m3fnuz", rot_dim=96, lora_rank=100, is_neox=True),  # the general path
]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_emulation(tmp_path_factory.mktemp("emulation"))
    torch.set_num_threads(threads)


@pytest.fixture(params=[(32, False), (64, True)], ids=["wave32", "wave64"])
def emulated(request: pytest.FixtureRequest, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's ops are the emulated ones."""
    emulation.configure(*request.param)
    monkeypatch.setattr(kernel, "op", lambda: emulation.op("concat_and_cache_mla_rope_fused"))
    monkeypatch.setattr(kernel, "norm_op", lambda: emulation.op("norm_concat_and_cache_mla_rope_fused"))
    monkeypatch.setattr(kernel, "norms_op", lambda: emulation.op("norms_rope_concat_and_cache_mla"))
    monkeypatch.setattr(kernel, "rope_query_op", lambda: emulation.op("rope_query"))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case: Case) -> None:
    test_kernel.test_against_float64(case, "cpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kv_cache_dtype", test_fp8_formats.FORMATS)
def test_fp8_formats_bit_for_bit(kv_cache_dtype: str) -> None:
    test_fp8_formats.test_all_65536_float16_values("cpu", kv_cache_dtype)
    test_fp8_formats.test_float32_values_around_every_rounding_boundary("cpu", kv_cache_dtype)
    for scale in (0.37, 3.0e-5, 117.3):
        test_fp8_formats.test_quotients_are_correctly_rounded("cpu", kv_cache_dtype, scale)


@pytest.mark.usefixtures("emulated")
def test_ds_mla_tiles_of_all_magnitudes() -> None:
    for row_pad in (0, 1):
        test_kernel.test_ds_mla_tiles_of_all_magnitudes("cpu", row_pad)


@pytest.mark.usefixtures("emulated")
def test_offsets_beyond_int32() -> None:
    test_kernel.test_offsets_beyond_int32("cpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("query", test_query_norm.QUERIES, ids=lambda query: query.name)
def test_before_q_b(query: test_query_norm.Query) -> None:
    test_query_norm.test_before_q_b(query, "cpu")


@pytest.mark.usefixtures("emulated")
def test_the_batch_changes_no_row() -> None:
    for quant in ("none", "group", "token"):
        test_query_norm.test_the_batch_changes_no_row(quant, "cpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", test_query_norm.ROPE_CASES, ids=lambda case: case.name)
def test_after_q_b(case: Case) -> None:
    test_query_norm.test_after_q_b(case, "cpu")
