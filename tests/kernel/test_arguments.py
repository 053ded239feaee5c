# SPDX-License-Identifier: Apache-2.0
"""The one description of the ops' arguments: the library's schemas, the layer ops' schemas, fakes and outputs."""

from __future__ import annotations

import pytest
import torch
from reference import Case, make_inputs
from test_query_norm import V3, Query, make_call

from vllm_mla_fusion import arguments, kernel
from vllm_mla_fusion.arguments import NORM, NORMS, OPS, PLAIN, ROPE_QUERY, Op, Part, Role

CASE = Case("rows", num_tokens=5, num_heads=2, kv_extra=32)
INPUTS = "Tensor positions, Tensor(a!) q_pe, Tensor k_pe, Tensor kv_c"
ROTATION = "Tensor cos_sin_cache, bool is_neox"
LAYER = {
    PLAIN: f"fused_concat_and_cache_mla_rope({INPUTS}, {ROTATION}, str kv_cache_dtype, Tensor kv_cache_scale, "
    "str layer_name) -> Tensor",
    NORM: f"fused_norm_concat_and_cache_mla_rope({INPUTS}, Tensor kv_c_weight, float epsilon, {ROTATION}, "
    "str kv_cache_dtype, Tensor kv_cache_scale, str layer_name) -> (Tensor, Tensor)",
    NORMS: "fused_norms_rope_concat_and_cache_mla(Tensor positions, Tensor q_c, Tensor q_c_weight, float q_epsilon, "
    f"Tensor k_pe, Tensor kv_c, Tensor kv_c_weight, float epsilon, {ROTATION}, str kv_cache_dtype, "
    "Tensor kv_cache_scale, str q_quant, bool q_rounds_twice, float q_smallest, Tensor? q_static_scale, "
    "str q_scales_layout, str layer_name) -> (Tensor, Tensor, Tensor, Tensor)",
    ROPE_QUERY: f"fused_rope_query(Tensor positions, Tensor(a!) q_pe, {ROTATION}, str layer_name) -> ()",
}
WRITING = [PLAIN, NORM, NORMS]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_schema_is_the_librarys(op: Op) -> None:
    assert str(kernel.overload(op)._schema) == f"{kernel.NAMESPACE}::{op.schema()}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_layer_schema(op: Op) -> None:
    """Compiled graphs in vLLM's caches call the layer ops by these."""
    assert op.layer_schema("str") == LAYER[op]
    torch._C.parse_schema(op.layer_schema("str"))


@pytest.mark.parametrize("op", WRITING, ids=lambda op: op.name)
def test_both_forms_agree(op: Op) -> None:
    """The layer op hands on what it is given, and puts in the cache's four and the outputs."""
    names = [each.name for each in op.arguments]
    layers = [each.name for each in op.layer_arguments if Role.FOR_OUTPUT not in each.roles]
    cache = ["slot_mapping", "kv_cache", "kv_cache_dtype", "kv_cache_scale"]
    rest = layers[op.before_cache + 2 :]
    assert names == [*layers[: op.before_cache], *cache, *rest, *(each.name for each in op.outputs)]
    assert layers[op.before_cache :] == [*cache[2:], *rest]


@pytest.mark.parametrize("op", [PLAIN, NORM], ids=lambda op: op.name)
def test_outputs_are_what_the_kernel_takes(op: Op) -> None:
    inputs = make_inputs(CASE.but(norm=Part.LATENT_NORM in op.parts))
    outputs = op.new_outputs(inputs.args())
    assert [output.shape for output in outputs] == [(5, 1, 64), (5, 512)][: len(outputs)]
    assert all(output.is_contiguous() for output in outputs)
    kernel.overload(op)(*inputs.args()[: -len(outputs)], *outputs)
    assert op.fake(*inputs.args()) is None


SCALES = {"none": (0,), "static": (0,), "token": (37, 1), "group": (37, 12), "group_ue8m0": (37, 12)}


@pytest.mark.parametrize(("layout", "strides"), zip(arguments.SCALE_LAYOUTS, [(12, 1), (1, 37), (1, 40)], strict=True))
@pytest.mark.parametrize("quant", SCALES)
def test_outputs_before_q_b(quant: str, layout: str, strides: tuple[int, int]) -> None:
    call = make_call(Query(V3, quant=quant), "cpu")
    given = dict(zip([each.name for each in NORMS.arguments], call.args(), strict=True)) | {"q_scales_layout": layout}
    values = tuple(given[each.name] for each in NORMS.layer_arguments)
    query, scales, key, latent = NORMS.new_outputs(values)
    assert (query.shape, query.dtype) == ((37, 1536), torch.bfloat16 if quant == "none" else torch.float8_e4m3fn)
    assert [output.shape for output in (scales, key, latent)] == [SCALES[quant], (37, 1, 64), (37, 512)]
    assert len(SCALES[quant]) == 1 or quant == "token" or scales.stride() == strides
    taken = scales if scales.dim() == 2 else None
    kernel.norms_op()(*call.args()[: -len(NORMS.outputs)], query, taken, key, latent)
    assert torch.equal(query.float(), call.run().q_c_out.float())
    assert NORMS.fake(*call.args()) is None


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
