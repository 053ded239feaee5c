# SPDX-License-Identifier: Apache-2.0
"""The one description of the ops' arguments: the library's schemas, the layer ops' schemas, fakes and outputs."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("op", WRITING, ids=lambda op: op.name)
def test_schema_of_the_one_that_makes_its_outputs(op: Op) -> None:
    assert str(kernel.overload(op, "fresh")._schema) == f"{kernel.NAMESPACE}::{op.fresh_schema()}"


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


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def described(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


@pytest.mark.parametrize("op", [PLAIN, NORM], ids=lambda op: op.name)
@pytest.mark.parametrize("dims", [2, 3])
def test_outputs(op: Op, dims: int) -> None:
    """Where the op makes them they are what the fake says, and hold what is written where they are given."""
    case = CASE.but(norm=Part.LATENT_NORM in op.parts)
    given, own = make_inputs(case), make_inputs(case)
    kernel.overload(op)(*given.args())
    values = list(own.args()[: -len(op.outputs)])
    key = [each.name for each in op.arguments].index("k_pe")
    values[key] = values[key].reshape(5, *[1] * (dims - 2), 64)
    found = kernel.overload(op, "fresh")(*values)
    found, faked = ((each,) if len(op.outputs) == 1 else each for each in (found, op.fresh_fake(*values)))
    assert [described(output) for output in found] == [described(output) for output in faked]
    assert [output.shape for output in found] == [(5, 1, 64), (5, 512)][: len(found)]
    assert all(output.is_contiguous() for output in found)
    expected = (*given.args()[-len(found) :], given.q_pe, given.cache_storage)
    for one, other in zip((*found, own.q_pe, own.cache_storage), expected, strict=True):
        assert torch.equal(as_bytes(one), as_bytes(other))
    assert op.fake(*given.args()) is None


SCALES = {"none": (0,), "static": (0,), "token": (37, 1), "group": (37, 12), "group_ue8m0": (37, 12)}


@pytest.mark.parametrize(("layout", "strides"), zip(arguments.SCALE_LAYOUTS, [(12, 1), (1, 37), (1, 40)], strict=True))
@pytest.mark.parametrize("quant", SCALES)
def test_outputs_before_q_b(quant: str, layout: str, strides: tuple[int, int]) -> None:
    call, own = (make_call(Query(V3, quant=quant), "cpu") for _ in range(2))
    given = dict(zip([each.name for each in NORMS.arguments], own.args(), strict=True)) | {"q_scales_layout": layout}
    values = tuple(given[each.name] for each in NORMS.fresh_arguments)
    outputs = kernel.overload(NORMS, "fresh")(*values)
    assert [described(output) for output in outputs] == [described(output) for output in NORMS.fresh_fake(*values)]
    query, scales, key, latent = outputs
    assert (query.shape, query.dtype) == ((37, 1536), torch.bfloat16 if quant == "none" else torch.float8_e4m3fn)
    assert [output.shape for output in (scales, key, latent)] == [SCALES[quant], (37, 1, 64), (37, 512)]
    assert len(SCALES[quant]) == 1 or quant == "token" or scales.stride() == strides
    run = call.run()
    cache = own.inputs.cache_storage
    expected = run.q_c_out, run.inputs.k_pe_out, run.inputs.kv_c_normed_out, run.inputs.cache_storage
    for one, other in zip((query, key, latent, cache), expected, strict=True):
        assert torch.equal(as_bytes(one), as_bytes(other))
    assert scales.dim() == 1 or torch.equal(scales, run.q_scales_out)
    assert NORMS.fake(*call.args()) is None


@pytest.mark.parametrize("op", WRITING, ids=lambda op: op.name)
def test_what_outputs_cannot_be_made_of(op: Op) -> None:
    """Is told before anything is written."""
    call: Any = make_call(Query(V3), "cpu") if op is NORMS else make_inputs(CASE.but(norm=op is NORM))
    given = dict(zip([each.name for each in op.arguments], call.args(), strict=True)) | {"q_scales_layout": "rows"}
    before = given["kv_cache"].clone()
    wrong: dict[str, object] = {"k_pe": given["k_pe"].flatten()}
    if op is not PLAIN:
        wrong["kv_c"] = given["kv_c"].flatten()
    if op is NORMS:
        wrong |= {"q_c": given["q_c"].flatten(), "q_quant": "row", "q_scales_layout": "heap", "q_smallest": 2.0**-81}
        for key in (given["k_pe"][1:], given["k_pe"][..., 1:]):
            values = [(given | {"k_pe": key})[each.name] for each in op.fresh_arguments]
            with pytest.raises(RuntimeError, match="k_pe must have a"):
                kernel.overload(op, "fresh")(*values)
    for name, value in wrong.items():
        values = [(given | {"q_quant": "group"} | {name: value})[each.name] for each in op.fresh_arguments]
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            kernel.overload(op, "fresh")(*values)
    assert torch.equal(as_bytes(given["kv_cache"]), as_bytes(before))


def test_no_memory_for_an_output() -> None:
    """Is told as such, and before anything is written."""
    inputs = make_inputs(CASE)
    inputs.k_pe = inputs.k_pe[:1].expand(1 << 42, 1, 64)
    with pytest.raises(RuntimeError, match=r"out of memory: none for an output of shape \[4398046511104, 1, 64\]"):
        kernel.overload(PLAIN, "fresh")(*inputs.args()[:-1])


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
