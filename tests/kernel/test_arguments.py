# SPDX-License-Identifier: Apache-2.0
"""The one description of the ops' arguments: the library's schemas, the layer ops' schemas, fakes and outputs."""

from __future__ import annotations

import pytest
import torch
from reference import Case, make_inputs

from vllm_mla_fusion import kernel
from vllm_mla_fusion.arguments import NORM, OPS, PLAIN, Op, Part

CASE = Case("rows", num_tokens=5, num_heads=2, kv_extra=32)
INPUTS = "Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c"
ROTATION = "Tensor cos_sin_cache, bool is_neox"
LAYER = {
    PLAIN: f"fused_concat_and_cache_mla_rope({INPUTS}, {ROTATION}, str kv_cache_dtype, Tensor kv_cache_scale, "
    "str layer_name) -> Tensor",
    NORM: f"fused_norm_concat_and_cache_mla_rope({INPUTS}, Tensor kv_c_weight, float epsilon, {ROTATION}, "
    "str kv_cache_dtype, Tensor kv_cache_scale, str layer_name) -> (Tensor, Tensor)",
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_schema_is_the_librarys(op: Op) -> None:
    assert str(kernel.overload(op)._schema) == f"{kernel.NAMESPACE}::{op.schema()}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_layer_schema(op: Op) -> None:
    """Compiled graphs in vLLM's caches call the layer ops by these."""
    assert op.layer_schema("str") == LAYER[op]
    torch._C.parse_schema(op.layer_schema("str"))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_both_forms_agree_up_to_the_cache(op: Op) -> None:
    """The layer op hands on what it is given, and puts in the cache's four and the outputs."""
    names = [each.name for each in op.arguments]
    layers = [each.name for each in op.layer_arguments]
    cache = ["slot_mapping", "kv_cache", "kv_cache_dtype", "kv_cache_scale"]
    assert names == [*layers[: op.before_cache], *cache, *(each.name for each in op.outputs)]
    assert layers[op.before_cache :] == cache[2:]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_outputs_are_what_the_kernel_takes(op: Op) -> None:
    inputs = make_inputs(CASE.but(norm=Part.LATENT_NORM in op.parts))
    outputs = op.new_outputs(inputs.args())
    assert [output.shape for output in outputs] == [(5, 1, 64), (5, 512)][: len(outputs)]
    assert all(output.is_contiguous() for output in outputs)
    kernel.overload(op)(*inputs.args()[: -len(outputs)], *outputs)
    assert op.fake(*inputs.args()) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "q_pe",
            torch.empty(5, 128, dtype=torch.bfloat16),
            r"q_pe must be \[num_tokens, num_heads, rot_dim\], got \(5, ",
        ),
        ("k_pe_out", torch.empty(5, 64, dtype=torch.bfloat16), r"k_pe_out must be \(5, 1, 64\), got \(5, 64\)"),
        ("k_pe_out", torch.empty(5, 1, 64), "k_pe_out must have dtype torch.bfloat16, got torch.float32"),
        ("kv_c_normed_out", torch.empty(4, 512), r"kv_c_normed_out must be \(5, 512\), got \(4, 512\)"),
    ],
)
def test_fakes_refuse(name: str, value: torch.Tensor, message: str) -> None:
    inputs = make_inputs(CASE.but(norm=True))
    setattr(inputs, name, value)
    with pytest.raises(RuntimeError, match=message):
        NORM.fake(*inputs.args())
