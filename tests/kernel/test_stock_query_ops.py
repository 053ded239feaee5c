# SPDX-License-Identifier: Apache-2.0
"""The ops around q_b against stock vLLM's ops for the same work, over 1.6 million values.

Stock's unfused quantisation of our own normalised query must give our bytes. Stock's fused ops normalise themselves,
and add the squares in another order: few values may differ, and the tests say how many (`pytest -rP`).
"""

from __future__ import annotations

import pytest
import torch
from reference import assert_within_one_rounding, make_inputs, rotate
from test_query_norm import E4M3, FUSED, PER_GROUP, V3, Call, Query, make_call

from vllm_mla_fusion import kernel

pytest.importorskip("vllm")

GPU = [pytest.mark.gpu, pytest.mark.skipif(torch.version.hip is not None, reason="stock has these ops on CUDA only")]
MANY = V3.but(num_tokens=1030)
FP16 = MANY.but(dtype=torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    kernel.load()


def ours(query: Query, device: str = "cuda") -> tuple[Call, torch.Tensor, torch.Tensor | None]:
    call = make_call(query, device)
    result = call.run()
    return call, result.q_c_out, result.q_scales_out


def differing(name: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The share that differs; prints the count."""
    assert actual.shape == expected.shape
    is_fp8 = actual.element_size() == 1
    differs = actual.view(torch.uint8) != expected.view(torch.uint8) if is_fp8 else actual != expected
    count = int(differs.sum())
    print(f"{name}: {count} of {actual.numel()} differ")
    return count / max(actual.numel(), 1)


@pytest.mark.parametrize("case", [MANY, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_op(case, device: str) -> None:
    from vllm import _custom_ops as stock

    call, plain, _ = ours(Query(case, "none", rounds_twice=False), device)
    expected = torch.empty_like(plain)
    stock.rms_norm(expected, call.q_c.contiguous(), call.q_c_weight, call.q_epsilon)
    assert differing("rms_norm", plain, expected) < 1e-3
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=2 * torch.finfo(case.dtype).eps)


UNFUSED = [
    Query(MANY, "group", "rows", smallest=PER_GROUP),
    Query(MANY, "group", "columns", smallest=PER_GROUP),
    Query(MANY, "group", "padded", smallest=PER_GROUP),
    Query(MANY, "group_ue8m0", "rows", smallest=PER_GROUP),
    Query(MANY, "group_ue8m0", "padded", smallest=PER_GROUP),
    Query(FP16, "group", "rows", smallest=PER_GROUP),
    Query(MANY, "group", "rows", smallest=PER_GROUP, magnitude=1e-6),
    Query(MANY, "group_ue8m0", "rows", smallest=PER_GROUP, magnitude=1e-6),
    Query(MANY, "group", "rows", smallest=PER_GROUP, rounds_twice=False),
    Query(MANY, "token"),
    Query(FP16, "token"),
    Query(MANY, "static"),
    Query(FP16, "static"),
]


def quantised_by_stock(query: Query, call: Call, plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    from vllm import _custom_ops as stock
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    if query.quant == "static":
        return stock.scaled_fp8_quant(plain, call.q_static_scale)[0], None
    if query.quant == "token":
        return stock.scaled_fp8_quant(plain, use_per_token_if_dynamic=True)
    return per_token_group_quant_fp8(
        plain,
        128,
        column_major_scales=query.layout != "rows",
        tma_aligned_scales=query.layout == "padded",
        use_ue8m0=query.quant == "group_ue8m0",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("query", UNFUSED, ids=lambda query: query.name)
def test_stock_quantises_our_norm_to_our_bytes(query: Query) -> None:
    call, values, scales = ours(query)
    _, plain, _ = ours(Query(query.case, "none", rounds_twice=query.rounds_twice, magnitude=query.magnitude))
    expected, expected_scales = quantised_by_stock(query, call, plain)
    if expected_scales is not None:
        if query.quant != "token":  # one column, whose stride means nothing
            assert scales.stride() == expected_scales.stride()
        assert differing("scales", scales, expected_scales) == 0
    assert differing("values", values, expected) == 0


FUSED_QUERIES = [
    Query(MANY, "group", "rows"),
    Query(MANY, "group", "columns"),
    Query(FP16, "group", "columns"),
    Query(MANY, "group", "rows", magnitude=1e-6),
    Query(MANY, "token"),
    Query(FP16, "token"),
    Query(MANY, "static", rounds_twice=False),
    Query(FP16, "static", rounds_twice=False),
]


def fused_by_stock(query: Query, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    from vllm import _custom_ops as stock

    q_c, weight, epsilon = call.q_c.contiguous(), call.q_c_weight, call.q_epsilon
    if query.quant == "static":
        out = torch.empty_like(q_c, dtype=E4M3)
        torch.ops._C.rms_norm_static_fp8_quant(out, q_c, weight, call.q_static_scale, epsilon)
        return out, None
    if query.quant == "token":
        return stock.rms_norm_dynamic_per_token_quant(q_c, weight, epsilon, E4M3)
    return stock.rms_norm_per_block_quant(
        q_c, weight, epsilon, E4M3, [1, 128], is_scale_transposed=query.layout == "columns"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("query", FUSED_QUERIES, ids=lambda query: query.name)
def test_fused_ops_of_stock(query: Query) -> None:
    assert query.smallest == FUSED
    call, values, scales = ours(query)
    expected, expected_scales = fused_by_stock(query, call)
    if expected_scales is not None:
        if query.quant != "token":  # one column, whose stride means nothing
            assert scales.stride() == expected_scales.stride()
        assert differing("scales", scales, expected_scales) < 2e-3
        torch.testing.assert_close(scales, expected_scales, rtol=2.0**-7, atol=0)
    assert differing("values", values, expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("is_neox", [False, True])
def test_rotary_op(is_neox: bool) -> None:
    """vLLM's op may round in between; ours is as near as one rounding allows."""
    from vllm import _custom_ops as stock

    inputs = make_inputs(V3.but(num_tokens=1030, num_heads=16, is_neox=is_neox), "cuda")
    q_pe, k_pe = inputs.q_pe.contiguous(), inputs.k_pe.clone()
    stock.rotary_embedding(inputs.positions, q_pe, k_pe, 64, inputs.cos_sin_cache, is_neox)
    exact = rotate(inputs.q_pe, inputs)
    kernel.rope_query_op()(inputs.positions, inputs.q_pe, inputs.cos_sin_cache, is_neox)
    assert_within_one_rounding(inputs.q_pe, exact)
    assert (inputs.q_pe.double() - exact).abs().mean() <= (q_pe.double() - exact).abs().mean() * 1.001
    torch.testing.assert_close(inputs.q_pe, q_pe, atol=2e-2, rtol=2e-2)
